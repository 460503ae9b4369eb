package tree

import (
	"context"
	"os"
	"runtime"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"github.com/layerfs/layerfs/internal/sys"
)

// Dir is a directory that [WalkParallel] has open.
type Dir struct {
	Parent *Dir   // nil for the root
	Name   string // empty for the root
	FD     int    // valid until Release
	Value  any    // the visitor's own

	pending atomic.Int64 // parts of the directory not yet visited, and directories in it
}

// Path returns the path of name in d below the root, slash-separated; the path
// of d itself if name is empty. Its cost grows with the depth.
func (d *Dir) Path(name string) string {
	p := name
	for ; d.Parent != nil; d = d.Parent {
		if p == "" {
			p = d.Name
		} else {
			p = d.Name + "/" + p
		}
	}
	return p
}

// Visitor is what [WalkParallel] calls, from several goroutines at once.
type Visitor interface {
	// Enter is called when a directory has been opened, before anything in
	// it is visited.
	Enter(d *Dir) error
	// Entry is called for each entry of d that is not a directory, in no
	// order. typ is DT_REG and so on, never DT_UNKNOWN, but the entry may
	// have been replaced since.
	Entry(d *Dir, name string, typ uint8) error
	// Leave is called when everything in d and below has been visited.
	Leave(d *Dir) error
	// Release is called once for each directory for which Enter was, also
	// when that failed or the walk is being given up. Then FD is closed.
	Release(d *Dir)
}

const (
	direntBytes = 32 << 10 // some thousand entries a call
	batchSize   = 64       // entries that one worker takes at once: a big directory is shared
)

// WalkParallel visits the directory open as root, which it does not close, and
// everything below, with up to workers goroutines (GOMAXPROCS if 0). It never
// follows a symlink; an entry that disappears meanwhile is left out.
//
// The first error of a visitor, or of the context, ends the walk and is
// returned after all calls have returned. Work is taken last in, first out, so
// that the number of open directories stays near workers times the depth of
// the tree.
func WalkParallel(ctx context.Context, root int, workers int, v Visitor) error {
	if workers <= 0 {
		workers = runtime.GOMAXPROCS(0)
	}
	w := &parallel{ctx: ctx, v: v}
	w.more.L = &w.mu
	// The walk reads through a descriptor of its own: the file offset of the
	// caller's is not touched.
	fd, err := sys.Openat(root, ".", unix.O_RDONLY|unix.O_DIRECTORY, 0)
	if err != nil {
		return err
	}
	w.enter(&Dir{FD: fd})
	var wg sync.WaitGroup
	for range workers {
		wg.Go(w.work)
	}
	wg.Wait()
	return w.err
}

// job is one piece of work on a directory: its next entries are to be read
// (entries nil), or entries that were read are to be visited.
type job struct {
	dir     *Dir
	entries []dirent
}

type parallel struct {
	ctx context.Context
	v   Visitor

	mu   sync.Mutex
	more sync.Cond
	jobs []job // guarded by mu; last in, first out
	open int   // directories entered and not released, guarded by mu
	err  error // first error, guarded by mu

	failed atomic.Bool // err != nil
}

func (w *parallel) work() {
	buf := make([]byte, direntBytes)
	for {
		w.mu.Lock()
		for len(w.jobs) == 0 && w.open > 0 {
			w.more.Wait()
		}
		if len(w.jobs) == 0 {
			w.mu.Unlock()
			return
		}
		j := w.jobs[len(w.jobs)-1]
		w.jobs[len(w.jobs)-1] = job{}
		w.jobs = w.jobs[:len(w.jobs)-1]
		w.mu.Unlock()

		// After a failure jobs are only counted off, so that directories
		// are released in order.
		if err := w.ctx.Err(); err != nil {
			w.fail(err)
		}
		if !w.failed.Load() {
			if j.entries == nil {
				w.fail(w.read(j.dir, buf))
			} else {
				w.fail(w.visit(j))
			}
		}
		w.done(j.dir)
	}
}

func (w *parallel) fail(err error) {
	if err == nil {
		return
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.err == nil {
		w.err = err
		w.failed.Store(true)
	}
}

// push adds jobs of one directory. Each counts as pending there.
func (w *parallel) push(d *Dir, jobs ...job) {
	d.pending.Add(int64(len(jobs)))
	w.mu.Lock()
	w.jobs = append(w.jobs, jobs...)
	w.mu.Unlock()
	if len(jobs) == 1 {
		w.more.Signal()
	} else {
		w.more.Broadcast()
	}
}

// enter takes over an open directory whose parent counts it as pending.
func (w *parallel) enter(d *Dir) {
	w.mu.Lock()
	w.open++
	w.mu.Unlock()
	if err := w.v.Enter(d); err != nil {
		w.fail(err)
	}
	w.push(d, job{dir: d})
}

// done counts off one piece of work of d and leaves what is complete.
func (w *parallel) done(d *Dir) {
	for d != nil && d.pending.Add(-1) == 0 {
		if !w.failed.Load() {
			w.fail(w.v.Leave(d))
		}
		w.v.Release(d)
		unix.Close(d.FD)
		w.mu.Lock()
		w.open--
		last := w.open == 0
		w.mu.Unlock()
		if last {
			w.more.Broadcast()
		}
		d = d.Parent
	}
}

// read reads one buffer of entries and pushes them in batches, on top of the
// job that will go on reading: so no more than a buffer of them waits.
func (w *parallel) read(d *Dir, buf []byte) error {
	n, err := getdents(d.FD, buf)
	if err != nil {
		return &os.PathError{Op: "getdents", Path: d.Path(""), Err: err}
	}
	if n == 0 {
		return nil
	}
	jobs := []job{{dir: d}}
	batch := make([]dirent, 0, batchSize)
	for e := range dirents(buf[:n]) {
		batch = append(batch, e)
		if len(batch) == batchSize {
			jobs = append(jobs, job{d, batch})
			batch = make([]dirent, 0, batchSize)
		}
	}
	if len(batch) > 0 {
		jobs = append(jobs, job{d, batch})
	}
	w.push(d, jobs...)
	return nil
}

func (w *parallel) visit(j job) error {
	for i, e := range j.entries {
		if e.typ == unix.DT_UNKNOWN {
			var st unix.Stat_t
			if err := unix.Fstatat(j.dir.FD, e.name, &st, unix.AT_SYMLINK_NOFOLLOW); err != nil {
				if err := gone("fstatat", j.dir.Path(e.name), err); err != nil {
					return err
				}
				continue
			}
			e.typ = uint8(st.Mode >> 12 & 0xf) // DT_x is S_IFx >> 12, dirent.h
		}
		if i > 0 && w.failed.Load() {
			return nil
		}
		if err := w.ctx.Err(); err != nil {
			return err
		}
		if e.typ != unix.DT_DIR {
			if err := w.v.Entry(j.dir, e.name, e.typ); err != nil {
				return err
			}
			continue
		}
		fd, err := openDir(j.dir.FD, e.name)
		if err != nil {
			if err := gone("openat", j.dir.Path(e.name), err); err != nil {
				return err
			}
			continue
		}
		// The rest of the batch goes first onto the stack: the new directory
		// is finished, and closed, before another one is opened here.
		child := &Dir{Parent: j.dir, Name: e.name, FD: fd}
		j.dir.pending.Add(1)
		if rest := j.entries[i+1:]; len(rest) > 0 {
			w.push(j.dir, job{j.dir, rest})
		}
		w.enter(child)
		return nil
	}
	return nil
}
