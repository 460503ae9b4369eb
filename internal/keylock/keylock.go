// Package keylock has one lock per key, whose waiters can give up.
package keylock

import (
	"context"
	"slices"
	"sync"
)

// Set is a set of locks named by strings. The zero value is ready. A lock
// takes memory only while somebody holds or waits for it.
type Set struct {
	mu    sync.Mutex
	locks map[string]*lock // guarded by mu
}

type lock struct {
	held chan struct{} // capacity 1; full while held
	refs int           // holders and waiters, guarded by Set.mu
}

// Lock locks the keys, waiting until ctx is done, and returns the function
// that unlocks them all. Several keys are taken in sorted order, so that calls
// with the same keys never block each other for ever; equal keys count once.
func (s *Set) Lock(ctx context.Context, keys ...string) (unlock func(), err error) {
	if len(keys) > 1 {
		keys = slices.Compact(slices.Sorted(slices.Values(keys)))
	}
	for i, k := range keys {
		if err := s.lock(ctx, k); err != nil {
			s.unlock(keys[:i])
			return nil, err
		}
	}
	return sync.OnceFunc(func() { s.unlock(keys) }), nil
}

// TryLock is Lock of one key that does not wait.
func (s *Set) TryLock(key string) (unlock func(), ok bool) {
	l := s.ref(key)
	select {
	case l.held <- struct{}{}:
		return sync.OnceFunc(func() { s.unlock([]string{key}) }), true
	default:
		s.unref(key)
		return nil, false
	}
}

// Held reports whether somebody has the lock of a key, or is about to.
func (s *Set) Held(key string) bool { return s.get(key) != nil }

func (s *Set) lock(ctx context.Context, key string) error {
	if err := ctx.Err(); err != nil {
		return context.Cause(ctx)
	}
	l := s.ref(key)
	select {
	case l.held <- struct{}{}:
		return nil
	case <-ctx.Done():
		s.unref(key)
		return context.Cause(ctx)
	}
}

func (s *Set) unlock(keys []string) {
	for _, k := range keys {
		<-s.get(k).held
		s.unref(k)
	}
}

func (s *Set) get(key string) *lock {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.locks[key]
}

func (s *Set) ref(key string) *lock {
	s.mu.Lock()
	defer s.mu.Unlock()
	l := s.locks[key]
	if l == nil {
		if s.locks == nil {
			s.locks = make(map[string]*lock)
		}
		l = &lock{held: make(chan struct{}, 1)}
		s.locks[key] = l
	}
	l.refs++
	return l
}

func (s *Set) unref(key string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	l := s.locks[key]
	if l.refs--; l.refs == 0 {
		delete(s.locks, key)
	}
}
