package keylock

import (
	"context"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

func TestLock(t *testing.T) {
	t.Run("excludes", func(t *testing.T) {
		var s Set
		var wg sync.WaitGroup
		n := 0
		for range 50 {
			wg.Go(func() {
				for range 100 {
					unlock, err := s.Lock(t.Context(), "a", "b")
					if err != nil {
						t.Error(err)
						return
					}
					n++
					unlock()
					unlock() // the second call does nothing
				}
			})
		}
		wg.Wait()
		require.Equal(t, 5000, n)
		require.Empty(t, s.locks, "locks left behind")
	})

	t.Run("opposite-orders", func(t *testing.T) {
		var s Set
		var wg sync.WaitGroup
		for _, keys := range [][]string{{"a", "b"}, {"b", "a"}, {"b", "c", "a"}, {"c", "c"}} {
			wg.Go(func() {
				for range 500 {
					unlock, err := s.Lock(t.Context(), keys...)
					if err != nil {
						t.Error(err)
						return
					}
					unlock()
				}
			})
		}
		wg.Wait()
		require.Empty(t, s.locks)
	})

	t.Run("context", func(t *testing.T) {
		var s Set
		unlock, err := s.Lock(t.Context(), "b")
		require.NoError(t, err)
		ctx, cancel := context.WithTimeout(t.Context(), time.Millisecond)
		defer cancel()
		_, err = s.Lock(ctx, "a", "b")
		require.ErrorIs(t, err, context.DeadlineExceeded)
		_, ok := s.TryLock("b")
		require.False(t, ok)
		again, ok := s.TryLock("a")
		require.True(t, ok, "a failed Lock must give back what it had")
		again()
		unlock()
		require.Empty(t, s.locks)
	})
}
