package layerdir

import (
	"context"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/layerfs/layerfs/internal/keylock"
)

// Locks are the locks of the layers of one root. The kernel keeps them for an
// open file, so they end with the process, however it ends.
//
// Every layer has a handful of bytes in one file that are locked, at a place
// given by the hash of its id; there is nothing to create or delete for a
// layer, and taking a lock is one call. Within the process [keylock.Set]
// stands before the kernel's lock, because the bytes locked through one open
// file do not exclude its own users.
//
// The lock of a layer orders everything that changes it: the verbs hold it
// briefly, an Apply or Remove for its whole length. Holds are shared and last
// from Get to Put. Holds are only taken and given up under the layer's lock.
type Locks struct {
	keys keylock.Set
	file lockFile
	more func() error // immutable; closes what goes with the locks

	// The locks and holds of this process, what [Dir] is doing, and one for
	// being open. At 0 the files are closed, so no call of another goroutine
	// can ever meet a descriptor that belongs to something else by now.
	users  atomic.Int64
	closed atomic.Bool
}

// Hold says how a layer is held; each is a byte of the layer's place.
type Hold int64

// The ways to hold a layer.
const (
	mutate       Hold = iota // the layer's lock itself
	HeldWritable             // by a Get that can write
	HeldReadOnly             // by a Get that cannot
	HeldPinned               // by a reader such as Diff, without a mount
	HeldPlanned              // beside one of the first two: who holds it mounts it himself, and knows where
	holdEnd
	bytesPerLayer = 8
)

// place returns the offset of a layer's bytes. Two ids at one place would only
// wait for each other needlessly.
func place(id string) int64 {
	sum := sha256.Sum256([]byte(id))
	return int64(binary.LittleEndian.Uint64(sum[:])>>6) * bytesPerLayer
}

func (l *Locks) open(path string, more func() error) error {
	l.more = more
	l.users.Store(1)
	return l.file.open(path)
}

// use keeps the files open until unuse. The error is os.ErrClosed if they are
// closed already.
func (l *Locks) use() error {
	for {
		n := l.users.Load()
		if n == 0 {
			return os.ErrClosed
		}
		if l.users.CompareAndSwap(n, n+1) {
			return nil
		}
	}
}

func (l *Locks) unuse() {
	if l.users.Add(-1) == 0 {
		_ = l.shut() // nobody is left to tell; nothing was written to them
	}
}

func (l *Locks) shut() error { return errors.Join(l.file.close(), l.more()) }

// Lock takes the locks of layers, waiting until ctx is done.
func (l *Locks) Lock(ctx context.Context, ids ...string) (unlock func(), err error) {
	if err := l.use(); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			l.unuse()
		}
	}()
	release, err := l.keys.Lock(ctx, ids...)
	if err != nil {
		return nil, err
	}
	// Sorted by place rather than by id would do as well; what matters is
	// that every process uses one order, and keylock's is by id.
	order := sorted(ids)
	at := make([]int64, 0, 2)
	free := func() {
		for _, p := range at {
			l.file.unlock(p, 1)
		}
		release()
	}
	for _, id := range order {
		p := place(id) + int64(mutate)
		if err := l.lock(ctx, p); err != nil {
			free()
			return nil, err
		}
		at = append(at, p)
	}
	var done atomic.Bool
	return func() {
		if done.Swap(true) {
			return
		}
		free()
		l.unuse()
	}, nil
}

// lock polls: a blocking lock call cannot be given up when ctx is done. Only
// another process can make it wait, since keylock was taken before.
func (l *Locks) lock(ctx context.Context, at int64) error {
	const longest = 20 * time.Millisecond // a compromise of latency and idle wake-ups
	for wait := 50 * time.Microsecond; ; wait = min(2*wait, longest) {
		ok, err := l.file.tryLock(at, 1, true)
		if err != nil || ok {
			return err
		}
		t := time.NewTimer(wait)
		select {
		case <-t.C:
		case <-ctx.Done():
			t.Stop()
			return context.Cause(ctx)
		}
	}
}

// TryLock takes the lock of a layer if nobody has it.
func (l *Locks) TryLock(id string) (unlock func(), ok bool, err error) {
	if err := l.use(); err != nil {
		return nil, false, err
	}
	release, ok := l.keys.TryLock(id)
	if !ok {
		l.unuse()
		return nil, false, nil
	}
	ok, err = l.file.tryLock(place(id)+int64(mutate), 1, true)
	if err != nil || !ok {
		release()
		l.unuse()
		return nil, false, err
	}
	return sync.OnceFunc(func() {
		l.file.unlock(place(id)+int64(mutate), 1)
		release()
		l.unuse()
	}), true, nil
}

// Hold takes a hold of this process on a layer whose lock the caller has.
// Holds of one kind do not count: the caller does.
func (l *Locks) Hold(id string, h Hold) error {
	if err := l.use(); err != nil {
		return err
	}
	ok, err := l.file.tryLock(place(id)+int64(h), 1, false)
	if err == nil && !ok {
		err = fmt.Errorf("[bug] somebody holds %s exclusively", id)
	}
	if err != nil {
		l.unuse()
	}
	return err
}

// Release gives up a hold of this process on a layer whose lock the caller has.
// It cannot fail.
func (l *Locks) Release(id string, h Hold) {
	l.file.unlock(place(id)+int64(h), 1)
	l.unuse()
}

// Others tells how other drivers, in this process or another, hold a layer
// whose lock the caller has.
type Others struct {
	Writable, ReadOnly, Pinned, Planned bool
}

// Any reports whether there is any hold.
func (o Others) Any() bool { return o.Writable || o.ReadOnly || o.Pinned }

// Got reports whether there is a hold by a Get.
func (o Others) Got() bool { return o.Writable || o.ReadOnly }

// Others asks the kernel. The usual answer, none, costs one call.
func (l *Locks) Others(id string) (Others, error) {
	var o Others
	if err := l.use(); err != nil {
		return o, err
	}
	defer l.unuse()
	p := place(id)
	held, err := l.file.probe(p+int64(HeldWritable), int64(holdEnd-HeldWritable))
	if err != nil || !held {
		return o, err
	}
	for _, b := range []struct {
		hold Hold
		to   *bool
	}{{HeldWritable, &o.Writable}, {HeldReadOnly, &o.ReadOnly}, {HeldPinned, &o.Pinned}, {HeldPlanned, &o.Planned}} {
		if *b.to, err = l.file.probe(p+int64(b.hold), 1); err != nil {
			return o, err
		}
	}
	return o, nil
}

// Close closes the files once nobody uses them. Holds that are left last until
// they are released or the process ends. A second call does nothing.
func (l *Locks) Close() error {
	if l.closed.Swap(true) || l.users.Add(-1) > 0 {
		return nil
	}
	return l.shut()
}

func errPath(op, path string, err error) error {
	return &os.PathError{Op: op, Path: path, Err: err}
}

func sorted(ids []string) []string {
	if len(ids) == 1 {
		return ids
	}
	return slices.Compact(slices.Sorted(slices.Values(ids)))
}
