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
	w.jobs = []job{w.enter(&Dir{FD: fd})}
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

// dirent is an entry that waits to be visited.
type dirent struct {
	name string
	typ  byte // DT_REG and so on; DT_UNKNOWN if the file system does not tell
}

type parallel struct {
	ctx context.Context
	v   Visitor

	mu   sync.Mutex
	more sync.Cond
	jobs []job // guarded by mu; last in, first out
	idle int   // workers that wait, guarded by mu
	open int   // directories entered and not released, guarded by mu
	err  error // first error, guarded by mu

	failed atomic.Bool // err != nil
}

func (w *parallel) work() {
	buf := make([]byte, direntBytes)
	for {
		j, ok := w.pop()
		if !ok {
			return
		}
		// What a job leaves to do next stays with this worker: waking
		// another one for each small directory costs more than it gains.
		for ok {
			var next job
			// After a failure jobs are only counted off, so that
			// directories are released in order.
			if err := w.ctx.Err(); err != nil {
				w.fail(err)
			}
			if !w.failed.Load() {
				var err error
				if j.entries == nil {
					next, ok, err = w.read(j.dir, buf)
				} else {
					next, ok, err = w.visit(j)
				}
				w.fail(err)
			} else {
				ok = false
			}
			w.done(j.dir)
			j = next
		}
	}
}

// pop waits for a job; ok is false if there will be none.
func (w *parallel) pop() (j job, ok bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for len(w.jobs) == 0 && w.open > 0 {
		w.idle++
		w.more.Wait()
		w.idle--
	}
	if len(w.jobs) == 0 {
		return job{}, false
	}
	last := len(w.jobs) - 1
	j, w.jobs[last] = w.jobs[last], job{}
	w.jobs = w.jobs[:last]
	return j, true
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
	defer w.mu.Unlock()
	w.jobs = append(w.jobs, jobs...)
	for range min(w.idle, len(jobs)) {
		w.more.Signal()
	}
}

// enter takes over an open directory whose parent counts it as pending, and
// returns the job to read it, which counts as pending there.
func (w *parallel) enter(d *Dir) job {
	w.mu.Lock()
	w.open++
	w.mu.Unlock()
	d.pending.Add(1)
	if err := w.v.Enter(d); err != nil {
		w.fail(err)
	}
	return job{dir: d}
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

// read reads entries until there is more than one batch of them, or no more.
// All batches but the last are pushed, on top of the job that goes on reading,
// so that no more than a buffer of entries waits.
func (w *parallel) read(d *Dir, buf []byte) (next job, ok bool, err error) {
	var batches []job
	batch := make([]dirent, 0, batchSize)
	for len(batches) == 0 {
		n, err := sys.Getdents(d.FD, buf)
		if err != nil {
			return job{}, false, &os.PathError{Op: "getdents", Path: d.Path(""), Err: err}
		}
		if n == 0 {
			if len(batch) == 0 {
				return job{}, false, nil
			}
			d.pending.Add(1)
			return job{d, batch}, true, nil
		}
		for list := sys.Dirents(buf[:n]); ; {
			e, ok, err := list.Next()
			if err != nil {
				return job{}, false, &os.PathError{Op: "getdents", Path: d.Path(""), Err: err}
			}
			if !ok {
				break
			}
			if len(batch) == batchSize {
				if batches == nil {
					batches = append(batches, job{dir: d})
				}
				batches = append(batches, job{d, batch})
				batch = make([]dirent, 0, batchSize)
			}
			batch = append(batch, dirent{string(e.Name), e.Type})
		}
	}
	w.push(d, batches...)
	d.pending.Add(1)
	return job{d, batch}, true, nil
}

// visit visits entries up to the first directory, which it opens and returns
// to be read next; the rest is pushed.
func (w *parallel) visit(j job) (next job, ok bool, err error) {
	for i, e := range j.entries {
		typ, err := sys.EntryType(j.dir.FD, e.name, e.typ)
		if err != nil {
			if err := gone("fstatat", j.dir.Path(e.name), err); err != nil {
				return job{}, false, err
			}
			continue
		}
		if i > 0 && w.failed.Load() {
			return job{}, false, nil
		}
		if err := w.ctx.Err(); err != nil {
			return job{}, false, err
		}
		if typ != unix.DT_DIR {
			if err := w.v.Entry(j.dir, e.name, typ); err != nil {
				return job{}, false, err
			}
			continue
		}
		fd, err := openDir(j.dir.FD, e.name)
		if err != nil {
			if err := gone("openat", j.dir.Path(e.name), err); err != nil {
				return job{}, false, err
			}
			continue
		}
		child := &Dir{Parent: j.dir, Name: e.name, FD: fd}
		j.dir.pending.Add(1)
		if rest := j.entries[i+1:]; len(rest) > 0 {
			w.push(j.dir, job{j.dir, rest})
		}
		return w.enter(child), true, nil
	}
	return job{}, false, nil
}
