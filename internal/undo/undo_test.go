package undo

import (
	"errors"
	"io/fs"
	"testing"

	"github.com/stretchr/testify/require"
)

func TestRun(t *testing.T) {
	do := func(fail error) (order []int, err error) {
		var s Stack
		defer s.Run(&err)
		for i := range 3 {
			s.Push(func() error {
				order = append(order, i)
				if i == 1 {
					return fs.ErrPermission
				}
				return nil
			})
		}
		return order, fail
	}
	t.Run("success-undoes-nothing", func(t *testing.T) {
		order, err := do(nil)
		require.NoError(t, err)
		require.Empty(t, order)
	})
	t.Run("failure", func(t *testing.T) {
		cause := errors.New("cause")
		_, err := do(cause)
		require.ErrorIs(t, err, cause)
		require.NotErrorIs(t, err, fs.ErrPermission)
		require.EqualError(t, err, "cause (rollback: permission denied)")
	})
	t.Run("last-in-first-out", func(t *testing.T) {
		var order []int
		err := errors.New("x")
		var s Stack
		for i := range 3 {
			s.Push(func() error { order = append(order, i); return nil })
		}
		s.Run(&err)
		require.Equal(t, []int{2, 1, 0}, order)
	})
}
