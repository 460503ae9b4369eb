package thin

import (
	"errors"
	"fmt"
	"io"
	"os"
	"sync"

	"golang.org/x/sys/unix"
)

// A device is read in chunks, because a round trip to it costs more than the
// bytes: nodes that were written together lie together.
const (
	chunkSize = 128 << 10
	maxChunks = 64
)

// DeviceReader reads the metadata of a pool. Safe for concurrent use, one read
// at a time.
type DeviceReader struct {
	mu     sync.Mutex
	f      *os.File
	direct bool
	buf    []byte        // maxChunks chunks, aligned as direct I/O wants
	at     map[int64]int // chunk of the device to chunk of buf
	chunk  [maxChunks]chunk
	next   int // chunk of buf to give up next
}

// chunk is a chunk that was read; the device may end in it.
type chunk struct {
	nr int64
	n  int
}

// OpenDevice opens the metadata of a pool for [Open]. The page cache of a block
// device may have what an earlier reader saw, so that is read with O_DIRECT. A
// regular file is read as any file: its page cache is what a loop device
// writes to, or is made invalid by its direct writes. So the file of a loop
// device is the faster choice.
//
// Open it after the metadata snapshot was reserved, and anew for the next one:
// what was read is kept.
func OpenDevice(path string) (*DeviceReader, error) {
	st, err := os.Stat(path)
	if err != nil {
		return nil, err
	}
	d := &DeviceReader{direct: !st.Mode().IsRegular(), at: map[int64]int{}}
	flag := os.O_RDONLY
	if d.direct {
		flag |= unix.O_DIRECT
	}
	if d.f, err = os.OpenFile(path, flag, 0); err != nil {
		return nil, err
	}
	if d.direct {
		d.buf, err = unix.Mmap(-1, 0, maxChunks*chunkSize, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
		if err != nil {
			return nil, errors.Join(&os.PathError{Op: "mmap", Path: path, Err: err}, d.f.Close())
		}
	}
	return d, nil
}

// ReadAt reads one block of [BlockSize] bytes; any other read is refused.
func (d *DeviceReader) ReadAt(p []byte, off int64) (int, error) {
	if len(p) != BlockSize || off < 0 || off%BlockSize != 0 {
		return 0, fmt.Errorf("metadata: read of %d bytes at %d is no block", len(p), off)
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.f == nil {
		return 0, os.ErrClosed
	}
	if !d.direct {
		return d.f.ReadAt(p, off)
	}
	nr, in := off/chunkSize, int(off%chunkSize)
	i, ok := d.at[nr]
	if !ok {
		var err error
		if i, err = d.load(nr); err != nil {
			return 0, err
		}
	}
	if in+len(p) > d.chunk[i].n {
		return 0, io.EOF
	}
	return copy(p, d.buf[i*chunkSize+in:]), nil
}

// load reads a chunk in place of the oldest one.
func (d *DeviceReader) load(nr int64) (int, error) {
	i := d.next
	d.next = (i + 1) % maxChunks
	if old, ok := d.at[d.chunk[i].nr]; ok && old == i {
		delete(d.at, d.chunk[i].nr)
	}
	n, err := d.f.ReadAt(d.buf[i*chunkSize:(i+1)*chunkSize], nr*chunkSize)
	if err != nil && !errors.Is(err, io.EOF) {
		return 0, err
	}
	d.chunk[i], d.at[nr] = chunk{nr, n}, i
	return i, nil
}

// Close closes the device.
func (d *DeviceReader) Close() error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.f == nil {
		return os.ErrClosed
	}
	err := d.f.Close()
	if d.direct {
		err = errors.Join(err, unix.Munmap(d.buf))
	}
	d.f = nil
	return err
}
