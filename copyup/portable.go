//go:build !linux || layerfs_portable

package copyup

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"

	"golang.org/x/sync/errgroup"

	"github.com/layerfs/layerfs"
)

// portable is one copy with nothing but package os.
type portable struct {
	counters
	ctx  context.Context
	opts *Options

	mu    sync.Mutex
	first map[likeness][]*linked // files with several names, guarded by mu
}

// likeness is what all names of a file share; it keeps the search short.
type likeness struct {
	size  int64
	mtime int64
}

// linked is a file with several names and the first copy of it.
type linked struct {
	info fs.FileInfo
	path string
	done chan struct{}
	ok   bool // valid once done is closed
}

func newPortable(ctx context.Context, opts *Options) (*portable, error) {
	if opts.InodeFlags {
		return nil, &layerfs.UnsupportedError{Feature: "copying inode flags", Reason: "not on " + runtime.GOOS}
	}
	p := &portable{ctx: ctx, opts: opts, first: map[likeness][]*linked{}}
	p.progress = opts.Progress
	return p, nil
}

func copyTree(ctx context.Context, dstDir, srcDir string, opts *Options) (_ Stats, err error) {
	p, err := newPortable(ctx, opts)
	if err != nil {
		return Stats{}, err
	}
	src, err := filepath.Abs(srcDir)
	if err != nil {
		return Stats{}, err
	}
	dst, err := filepath.Abs(dstDir)
	if err != nil {
		return Stats{}, err
	}
	if dst == src || strings.HasPrefix(dst, strings.TrimSuffix(src, string(filepath.Separator))+string(filepath.Separator)) {
		return Stats{}, fmt.Errorf("the destination is inside the source: %w", fs.ErrInvalid)
	}
	made := true
	if err := os.Mkdir(dst, 0o700); errors.Is(err, fs.ErrExist) {
		made = false
		entries, err := os.ReadDir(dst)
		if err != nil {
			return Stats{}, err
		}
		if len(entries) > 0 {
			return Stats{}, &fs.PathError{Op: "copy", Path: dst, Err: fs.ErrExist}
		}
	} else if err != nil {
		return Stats{}, err
	}
	defer func() {
		if err != nil {
			if uerr := removeCopy(dst, made); uerr != nil {
				err = fmt.Errorf("%w (rollback: %v)", err, uerr)
			}
		}
	}()
	workers := opts.Workers
	if workers <= 0 {
		workers = runtime.GOMAXPROCS(0)
	}
	g, gctx := errgroup.WithContext(ctx)
	g.SetLimit(workers)
	p.ctx = gctx
	// Directories are made by this goroutine and get their attributes when
	// all files are there, the deepest first.
	type dir struct {
		src, dst string
		info     fs.FileInfo
	}
	var dirs []dir
	err = filepath.WalkDir(src, func(path string, e fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if err := gctx.Err(); err != nil {
			return err
		}
		rel, err := filepath.Rel(src, path)
		if err != nil {
			return err
		}
		to := filepath.Join(dst, rel)
		info, err := e.Info()
		if err != nil {
			return err
		}
		if !e.IsDir() {
			g.Go(func() error { return p.entry(to, path, info) })
			return nil
		}
		if rel != "." {
			if err := os.Mkdir(to, 0o700); err != nil {
				return err
			}
		}
		p.entries.Add(1)
		dirs = append(dirs, dir{path, to, info})
		return nil
	})
	if werr := g.Wait(); werr != nil {
		err = werr // the walk only saw the context end
	}
	for i := len(dirs) - 1; i >= 0 && err == nil; i-- {
		err = p.attributes(dirs[i].dst, dirs[i].info)
	}
	if err != nil {
		return Stats{}, err
	}
	p.finish()
	return p.stats(), nil
}

func removeCopy(path string, self bool) error {
	// Read-only directories and, on Windows, files cannot be emptied.
	filepath.WalkDir(path, func(p string, e fs.DirEntry, err error) error {
		if err == nil && e.Type()&fs.ModeSymlink == 0 {
			os.Chmod(p, 0o700)
		}
		return nil
	})
	if self {
		return os.RemoveAll(path)
	}
	entries, err := os.ReadDir(path)
	if err != nil {
		return err
	}
	for _, e := range entries {
		if err := os.RemoveAll(filepath.Join(path, e.Name())); err != nil {
			return err
		}
	}
	return nil
}

// entry copies what is not a directory, or links it to an earlier copy.
func (p *portable) entry(dst, src string, info fs.FileInfo) error {
	if err := p.ctx.Err(); err != nil {
		return err
	}
	defer p.tick()
	p.entries.Add(1)
	if linkCount(info) < 2 {
		return p.copy(dst, src, info)
	}
	l, isFirst := p.claim(dst, info)
	if isFirst {
		defer close(l.done)
		err := p.copy(dst, src, info)
		l.ok = err == nil
		return err
	}
	select {
	case <-l.done:
	case <-p.ctx.Done():
		return p.ctx.Err()
	}
	if !l.ok {
		return fmt.Errorf("link %s: the first name was not copied", dst)
	}
	p.links.Add(1)
	return os.Link(l.path, dst)
}

// claim finds the copy of a file with several names, or makes dst the first.
func (p *portable) claim(dst string, info fs.FileInfo) (*linked, bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	key := likeness{info.Size(), info.ModTime().UnixNano()}
	for _, l := range p.first[key] {
		if os.SameFile(l.info, info) {
			return l, false
		}
	}
	l := &linked{info: info, path: dst, done: make(chan struct{})}
	p.first[key] = append(p.first[key], l)
	return l, true
}

func (p *portable) copy(dst, src string, info fs.FileInfo) error {
	switch info.Mode().Type() {
	case 0:
		if err := p.content(dst, src); err != nil {
			return err
		}
	case fs.ModeSymlink:
		target, err := os.Readlink(src)
		if err != nil {
			return err
		}
		if err := os.Symlink(target, dst); err != nil {
			return err
		}
		return p.owner(dst, info)
	case fs.ModeDevice, fs.ModeDevice | fs.ModeCharDevice:
		if p.opts.Devices == layerfs.DevicesSkip {
			p.skipped.Add(1)
			p.entries.Add(-1)
			return nil
		}
		fallthrough
	default:
		return &fs.PathError{Op: "copy", Path: src, Err: &layerfs.UnsupportedError{
			Feature: "copying " + info.Mode().Type().String(), Reason: "not on " + runtime.GOOS,
		}}
	}
	return p.attributes(dst, info)
}

func (p *portable) content(dst, src string) (err error) {
	in, err := os.Open(src)
	if err != nil {
		return err
	}
	defer in.Close()
	out, err := os.OpenFile(dst, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	defer func() {
		if cerr := out.Close(); err == nil {
			err = cerr
		}
	}()
	var r io.Reader = in
	if p.opts.Size != nil {
		r = io.LimitReader(in, max(*p.opts.Size, 0))
	}
	for {
		if err := p.ctx.Err(); err != nil {
			return err
		}
		n, err := io.CopyN(out, r, 16<<20)
		p.bytes.Add(n)
		p.tick()
		if err == io.EOF {
			return nil
		}
		if err != nil {
			return err
		}
	}
}

// attributes sets owner, mode and times of a file or directory.
func (p *portable) attributes(path string, info fs.FileInfo) error {
	if err := p.owner(path, info); err != nil {
		return err
	}
	const modes = fs.ModePerm | fs.ModeSetuid | fs.ModeSetgid | fs.ModeSticky
	if err := os.Chtimes(path, accessTime(info), info.ModTime()); err != nil {
		return err
	}
	return os.Chmod(path, info.Mode()&modes)
}

func (p *portable) owner(path string, info fs.FileInfo) error {
	uid, gid, ok := owner(info)
	if !ok || p.opts.IgnoreOwners {
		return nil
	}
	return os.Lchown(path, uid, gid)
}

func copyFile(ctx context.Context, dst, src string, opts *Options) error {
	p, err := newPortable(ctx, opts)
	if err != nil {
		return err
	}
	info, err := os.Lstat(src)
	if err != nil {
		return err
	}
	if info.IsDir() {
		return &fs.PathError{Op: "copy", Path: src, Err: errors.New("is a directory")}
	}
	return p.publish(dst, src, info)
}

// publish copies to a temporary name and links or renames it into place.
func (p *portable) publish(dst, src string, info fs.FileInfo) (err error) {
	if err := p.ctx.Err(); err != nil {
		return err
	}
	if _, err := os.Lstat(dst); err == nil {
		return &fs.PathError{Op: "copy", Path: dst, Err: fs.ErrExist}
	}
	tmp := filepath.Join(filepath.Dir(dst), tempName())
	defer func() {
		if err != nil {
			os.RemoveAll(tmp)
		}
	}()
	if info.IsDir() {
		if err := os.Mkdir(tmp, 0o700); err != nil {
			return err
		}
		if err := p.attributes(tmp, info); err != nil {
			return err
		}
		return os.Rename(tmp, dst)
	}
	if err := p.copy(tmp, src, info); err != nil {
		return err
	}
	if info.Mode().IsRegular() && os.Link(tmp, dst) == nil { // never replaces
		return os.Remove(tmp)
	}
	return os.Rename(tmp, dst)
}

func copyUp(ctx context.Context, upper string, lowers []string, path string, opts *Options) error {
	p, err := newPortable(ctx, opts)
	if err != nil {
		return err
	}
	for end := 0; end < len(path); {
		n := strings.IndexByte(path[end+min(end, 1):], '/')
		if n < 0 {
			end = len(path)
		} else {
			end += min(end, 1) + n
		}
		if err := p.upEntry(upper, lowers, path[:end], end < len(path)); err != nil {
			return err
		}
	}
	return nil
}

func (p *portable) upEntry(upper string, lowers []string, path string, dir bool) error {
	dst := filepath.Join(upper, filepath.FromSlash(path))
	if _, err := os.Lstat(dst); err == nil || !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	parent, err := os.Stat(filepath.Dir(dst))
	if err != nil {
		return err
	}
	for _, l := range lowers {
		src := filepath.Join(l, filepath.FromSlash(path))
		info, err := os.Lstat(src)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return err
		}
		if dir && !info.IsDir() {
			return &fs.PathError{Op: "copy", Path: src, Err: errors.New("is not a directory")}
		}
		if err := p.publish(dst, src, info); err != nil && !errors.Is(err, fs.ErrExist) {
			return err
		}
		return os.Chtimes(filepath.Dir(dst), accessTime(parent), parent.ModTime())
	}
	return &fs.PathError{Op: "copy", Path: path, Err: fs.ErrNotExist}
}
