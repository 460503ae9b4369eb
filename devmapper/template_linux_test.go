package devmapper

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"testing"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/layerfs/layerfs"
	"github.com/layerfs/layerfs/internal/layerdir"
	"github.com/layerfs/layerfs/internal/testenv"
)

// Template makes roots with a pool and a base device that were made once: mkfs
// is most of what a small test costs where every instruction is emulated. What
// New does with a root that is new has tests of its own.
type Template struct {
	Options Options

	once  sync.Once
	err   error
	state []byte
	files map[string]sparse // by path below the home directory
}

// sparse is a sparse file in memory.
type sparse struct {
	size   int64
	chunks map[int64][]byte
}

// Root returns a new directory in memory with a copy of the template.
func (x *Template) Root(tb testing.TB) string {
	tb.Helper()
	root := newRoot(tb)
	x.once.Do(func() { x.err = x.make(root) })
	testenv.SkipUnsupported(tb, x.err, "devmapper")
	require.NoError(tb, x.err)
	root = filepath.Join(root, "root")
	require.NoError(tb, x.write(root))
	return root
}

// make makes the root that is copied.
func (x *Template) make(dir string) error {
	dir = filepath.Join(dir, "template")
	if err := os.Mkdir(dir, 0o755); err != nil {
		return err
	}
	d, err := New(dir, &x.Options)
	if err != nil {
		return err
	}
	if err := d.Close(); err != nil {
		return err
	}
	if x.state, err = os.ReadFile(d.m.statePath()); err != nil {
		return err
	}
	x.files = make(map[string]sparse)
	for _, path := range []string{d.m.dataFile(), d.m.metadataFile()} {
		name, err := filepath.Rel(d.m.home, path)
		if err != nil {
			return err
		}
		if x.files[name], err = readImage(path); err != nil {
			return err
		}
	}
	return os.RemoveAll(dir)
}

// write makes a root. Its identity is in the uuids of its devices, of which the
// kernel has each once.
func (x *Template) write(root string) error {
	home := filepath.Join(root, homeDir)
	if err := os.MkdirAll(home, 0o711); err != nil {
		return err
	}
	dir, err := layerdir.Open(home, layerfs.DurabilityNone) // refuses files without its own
	if err != nil {
		return err
	}
	if err := dir.Close(); err != nil {
		return err
	}
	if err := os.Mkdir(filepath.Join(home, "devicemapper"), 0o711); err != nil {
		return err
	}
	if err := os.Chmod(root, 0o755); err != nil {
		return err
	}
	var s poolState
	if err := json.Unmarshal(x.state, &s); err != nil {
		return err
	}
	s.Root = uuid()
	state, err := json.Marshal(s)
	if err != nil {
		return err
	}
	for name, i := range x.files {
		if err := i.write(filepath.Join(home, name)); err != nil {
			return err
		}
	}
	return os.WriteFile(filepath.Join(home, "pool.json"), state, 0o600)
}

func readImage(path string) (sparse, error) {
	f, err := os.Open(path)
	if err != nil {
		return sparse{}, err
	}
	defer f.Close()
	fi, err := f.Stat()
	if err != nil {
		return sparse{}, err
	}
	i := sparse{size: fi.Size(), chunks: make(map[int64][]byte)}
	for end := int64(0); ; {
		at, err := unix.Seek(int(f.Fd()), end, unix.SEEK_DATA)
		if errors.Is(err, unix.ENXIO) {
			return i, nil
		}
		if err != nil {
			return sparse{}, fmt.Errorf("data of %s: %w", path, err)
		}
		if end, err = unix.Seek(int(f.Fd()), at, unix.SEEK_HOLE); err != nil {
			return sparse{}, fmt.Errorf("hole of %s: %w", path, err)
		}
		// The log of xfs is 64 MiB of zeroes that mkfs writes.
		const piece = 64 << 10
		for ; at < end; at += piece {
			b := make([]byte, min(piece, end-at))
			if _, err := f.ReadAt(b, at); err != nil {
				return sparse{}, err
			}
			if !allZero(b) {
				i.chunks[at] = b
			}
		}
	}
}

func (i sparse) write(path string) error {
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	err = f.Truncate(i.size)
	for at, b := range i.chunks {
		_, werr := f.WriteAt(b, at)
		err = errors.Join(err, werr)
	}
	return errors.Join(err, f.Close())
}
