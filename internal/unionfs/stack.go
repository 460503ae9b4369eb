//go:build linux

package unionfs

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"

	"golang.org/x/sys/unix"
)

// Insert puts a branch at index at, which may be the number of branches. What
// is open stays with its branch; new lookups see the branch at once. EDOM for
// an index out of range. The caller makes its clients look again.
func (fs *FS) Insert(at int, s BranchSpec) ([]Repaired, error) {
	b, err := openBranch(s.Path, s.Perm)
	if err != nil {
		return nil, err
	}
	fs.stackMu.Lock()
	defer fs.stackMu.Unlock()
	if at < 0 || at > len(fs.stack) {
		b.close()
		return nil, fmt.Errorf("branch index %d of %d: %w", at, len(fs.stack), unix.EDOM)
	}
	if err := checkOverlap(fs.stack, b); err != nil {
		b.close()
		return nil, err
	}
	done, err := fs.join(b, false)
	if err != nil {
		b.close()
		return done, err
	}
	fs.tabMu.Lock()
	fs.devIdx(b.dev)
	fs.tabMu.Unlock()
	fs.stack = slices.Insert(slices.Clone(fs.stack), at, b)
	fs.restack(nil)
	return done, nil
}

// Delete takes a branch away: EBUSY while a file on it is open, ENOENT if
// there is no such branch, EINVAL for the last one.
func (fs *FS) Delete(path string) error {
	fs.stackMu.Lock()
	defer fs.stackMu.Unlock()
	b, err := fs.branch(path)
	if err != nil {
		return err
	}
	if len(fs.stack) == 1 {
		return &os.PathError{Op: "delete branch", Path: path, Err: unix.EINVAL}
	}
	if b.files.Load() > 0 {
		return &os.PathError{Op: "delete branch", Path: path, Err: unix.EBUSY}
	}
	if err := fs.flushLinks(); err != nil {
		return err
	}
	if b.perm == RW {
		if err := b.unmark(); err != nil {
			return err
		}
	}
	fs.stack = slices.DeleteFunc(slices.Clone(fs.stack), func(o *Branch) bool { return o == b })
	fs.restack(b)
	b.close()
	return nil
}

// Modify changes what a branch may be used for. EBUSY while a descriptor may
// write a file of it and it is to become read-only: that of a file open for
// writing, or of one that was created and has been open without a pause since.
// A branch that stays writable keeps its lock throughout. So does one that could
// neither be given up nor be marked as before: it is read-only, and Modify to any
// such permission tries again.
func (fs *FS) Modify(path string, perm Perm) ([]Repaired, error) {
	fs.stackMu.Lock()
	defer fs.stackMu.Unlock()
	b, err := fs.branch(path)
	if err != nil {
		return nil, err
	}
	if b.perm == perm && (perm == RW || b.lock == nil) {
		return nil, nil
	}
	fail := func(err error) ([]Repaired, error) {
		return nil, &os.PathError{Op: "modify branch", Path: path, Err: err}
	}
	var done []Repaired
	old := b.perm
	switch {
	case old == RW:
		if b.wopen.Load() > 0 {
			return fail(unix.EBUSY)
		}
		if err := fs.flushLinks(); err != nil {
			return fail(err)
		}
		if err := b.unmark(); err != nil {
			return fail(err)
		}
		b.perm = perm
		if err := b.restrict(); err != nil {
			merr := b.mark()
			if merr == nil {
				b.perm = old
				return fail(err)
			}
			// Nothing must be written without the mark. The lock stays,
			// since what is open may still write.
			fs.log.Error("branch is read-only, but not given up", "branch", path, "err", merr)
			fs.restack(nil)
			return fail(errors.Join(err, merr))
		}
		b.release()
	case perm == RW:
		b.perm = perm
		if err := b.restrict(); err != nil {
			b.perm = old
			return fail(err)
		}
		if done, err = fs.join(b, false); err != nil {
			b.perm = old
			if rerr := b.restrict(); rerr != nil {
				fs.log.Error("branch stays writable", "branch", path, "err", rerr)
			}
			return done, err
		}
	default:
		// What an earlier call could not give up is given up here.
		if b.wopen.Load() > 0 {
			return fail(unix.EBUSY)
		}
		b.perm = perm
		if err := b.restrict(); err != nil {
			b.perm = old
			return fail(err)
		}
		b.release()
	}
	fs.restack(nil)
	return done, nil
}

func (fs *FS) branch(path string) (*Branch, error) {
	abs, err := filepath.Abs(path)
	if err != nil {
		return nil, err
	}
	for _, b := range fs.stack {
		if b.path == abs {
			return b, nil
		}
	}
	return nil, &os.PathError{Op: "branch", Path: path, Err: unix.ENOENT}
}

// restack makes every known directory find its instances again. Those on the
// branch gone are dropped at once, since its descriptor is closed next. No
// operation runs: stackMu is held.
func (fs *FS) restack(gone *Branch) {
	fs.gen.Add(1)
	var dropped []*inst
	is := fs.rootInsts(fs.root)
	for _, i := range is {
		for _, o := range fs.root.insts {
			if o.br == i.br {
				i.watched.Store(o.watched.Load())
			}
		}
	}
	fs.eachNode(func(n *Node) {
		n.snap = nil
		n.changes.Add(1)
		fs.unindex(n, "")
		if n == fs.root || !n.IsDir() {
			return
		}
		n.stale.Store(true)
		if gone == nil {
			return
		}
		n.insts = slices.DeleteFunc(slices.Clone(n.insts), func(i *inst) bool {
			if i.br == gone {
				dropped = append(dropped, i)
			}
			return i.br == gone
		})
	})
	fs.tabMu.Lock()
	fs.root.insts = is
	fs.hid = nil
	fs.counted.Store(false)
	fs.countAgain.Store(0)
	fs.tabMu.Unlock()
	for _, i := range dropped {
		i.drop()
	}
}
