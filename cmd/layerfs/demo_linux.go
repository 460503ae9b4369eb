package main

import (
	"context"
	"errors"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/layerfs/layerfs"
	"github.com/layerfs/layerfs/internal/sys"
)

func crossDevice(err error) bool { return errors.Is(err, unix.EXDEV) }

func kernel() string {
	var u unix.Utsname
	if err := unix.Uname(&u); err != nil {
		return "Linux"
	}
	return "Linux " + unix.ByteSliceToString(u.Release[:]) + " " + unix.ByteSliceToString(u.Machine[:])
}

// load is how many processes wanted a CPU or a disk in the last minute; see
// proc_loadavg(5).
func load() (string, bool) {
	b, err := os.ReadFile("/proc/loadavg")
	first, _, ok := strings.Cut(string(b), " ")
	return first, err == nil && ok
}

// measure takes the files of a tree out of the page cache, reads them all
// through reader, and tells how much of them is in the cache as seen through
// other, which reads nothing in between. Pages that are there are the same
// pages: mincore(2) looks at those of the file that a mapping shows, which for
// overlayfs is the file of the layer below.
//
// The error matches errors.ErrUnsupported where pages do not leave the cache,
// as on tmpfs, where they are the files.
func (m *demoMemory) measure(ctx context.Context, reader, other string) error {
	if err := sys.Syncfs(other); err != nil { // dirty pages stay
		return err
	}
	for _, root := range []string{reader, other} {
		if err := eachFile(ctx, root, evict); err != nil {
			return err
		}
	}
	var err error
	if m.Before, m.Bytes, err = resident(ctx, other); err != nil {
		return err
	}
	if percent(m.Before, m.Bytes) > 50 {
		return &layerfs.UnsupportedError{
			Feature: "measuring the page cache",
			Reason:  "this file system keeps its files in it",
		}
	}
	begin := time.Now()
	if err := readTree(ctx, reader); err != nil {
		return err
	}
	m.Cold = time.Since(begin)
	if m.After, _, err = resident(ctx, other); err != nil {
		return err
	}
	begin = time.Now()
	err = readTree(ctx, other)
	m.Warm = time.Since(begin)
	return err
}

// eachFile calls a function for every regular file that is not empty.
func eachFile(ctx context.Context, root string, do func(f *os.File, size int64) error) error {
	return filepath.WalkDir(root, func(path string, e fs.DirEntry, err error) error {
		if err == nil {
			err = context.Cause(ctx)
		}
		if err != nil || !e.Type().IsRegular() {
			return err
		}
		f, err := os.Open(path)
		if errors.Is(err, fs.ErrPermission) { // of another user
			return nil
		}
		if err != nil {
			return err
		}
		defer f.Close()
		fi, err := f.Stat()
		if err != nil || fi.Size() == 0 {
			return err
		}
		return do(f, fi.Size())
	})
}

func evict(f *os.File, _ int64) error {
	return os.NewSyscallError("fadvise", unix.Fadvise(int(f.Fd()), 0, 0, unix.FADV_DONTNEED))
}

func readTree(ctx context.Context, root string) error {
	buf := make([]byte, 256<<10)
	return eachFile(ctx, root, func(f *os.File, _ int64) error {
		_, err := io.CopyBuffer(io.Discard, struct{ io.Reader }{f}, buf)
		return err
	})
}

// resident returns how many bytes of the files of a tree are in memory.
// Of a huge file it looks at the beginning.
func resident(ctx context.Context, root string) (in, all int64, err error) {
	const most = 1 << 30 // fits any address space
	page := int64(os.Getpagesize())
	err = eachFile(ctx, root, func(f *os.File, size int64) error {
		size = min(size, most)
		m, err := unix.Mmap(int(f.Fd()), 0, int(size), unix.PROT_READ, unix.MAP_SHARED)
		if err != nil {
			return &fs.PathError{Op: "mmap", Path: f.Name(), Err: err}
		}
		pages, err := sys.Mincore(m)
		for i, p := range pages {
			if p&1 != 0 {
				in += min(page, size-int64(i)*page)
			}
		}
		all += size
		return errors.Join(err, unix.Munmap(m))
	})
	return in, all, err
}
