//go:build !layerfs_portable

package copyup

import (
	"bytes"
	"errors"
	"os"

	"golang.org/x/sys/unix"
)

const (
	// smallFile is what is read at once: below, read and write cost less than
	// copy_file_range, which sets up a splice.
	smallFile = 128 << 10
	// chunk bounds how long a cancelled copy goes on.
	chunk = 16 << 20
	// block is the unit in which zeros are looked for where the file system
	// cannot tell holes.
	block = 4096
)

// scratch is the memory of one worker.
type scratch struct {
	data  [smallFile]byte
	list  [64 << 10]byte // XATTR_LIST_MAX
	value [64 << 10]byte // XATTR_SIZE_MAX
}

var zeros [block]byte

// data copies the content of src to dst, a new file that is open for writing.
func (c *copier) data(dst, src int, st *unix.Stat_t, s *scratch) error {
	size := st.Size
	if c.opts.Size != nil {
		size = min(size, *c.opts.Size)
	}
	if size <= 0 {
		return nil
	}
	if size == st.Size && !c.noClone.Load() {
		err := unix.IoctlFileClone(dst, src)
		switch err {
		case nil:
			c.bytes.Add(size)
			c.shared.Add(size)
			return nil
		case unix.EOPNOTSUPP, unix.ENOTTY, unix.ENOSYS:
			c.noClone.Store(true)
		case unix.ENOSPC, unix.EDQUOT, unix.EIO, unix.EFBIG:
			return &os.PathError{Op: "ioctl FICLONE", Err: err}
		case unix.EXDEV:
			// Only this mount of the source is elsewhere, if it is not the
			// one the copy started on.
			if st.Dev == c.dev {
				c.noClone.Store(true)
			}
		default:
			// Some files cannot be shared, such as one that is not
			// copy-on-write with one that is.
		}
	}
	if st.Blocks*512 >= size {
		_, err := c.copyRange(dst, src, 0, size, false, s)
		return err
	}
	end, err := c.sparse(dst, src, size, s)
	if err == nil && end < size {
		err = os.NewSyscallError("ftruncate", unix.Ftruncate(dst, size))
	}
	return err
}

// sparse copies the data of a file with holes and returns where it ended.
func (c *copier) sparse(dst, src int, size int64, s *scratch) (end int64, err error) {
	for !c.noSeek.Load() {
		start, err := unix.Seek(src, end, unix.SEEK_DATA)
		switch {
		case err == unix.ENXIO || err == nil && start >= size:
			return end, nil
		case err == unix.EINVAL || err == unix.EOPNOTSUPP:
			c.noSeek.Store(true)
			continue
		case err != nil:
			return end, os.NewSyscallError("lseek SEEK_DATA", err)
		}
		hole, err := unix.Seek(src, start, unix.SEEK_HOLE)
		if err == unix.ENXIO { // it has been truncated since
			return end, nil
		}
		if err != nil {
			return end, os.NewSyscallError("lseek SEEK_HOLE", err)
		}
		hole = min(hole, size)
		if end, err = c.copyRange(dst, src, start, hole-start, false, s); err != nil || end < hole {
			return end, err
		}
	}
	return c.copyRange(dst, src, end, size-end, true, s)
}

// copyRange copies n bytes at offset off and returns where it ended: before
// off+n only if the source got shorter, or if skipZeros and the rest is zero.
func (c *copier) copyRange(dst, src int, off, n int64, skipZeros bool, s *scratch) (int64, error) {
	end := off + n
	if n > smallFile && !skipZeros {
		var err error
		if off, err = c.kernelCopy(dst, src, off, end); err != nil || off == end {
			return off, err
		}
	}
	written := off
	for off < end {
		if err := c.ctx.Err(); err != nil {
			return off, err
		}
		buf := s.data[:min(end-off, smallFile)]
		n, err := unix.Pread(src, buf, off)
		if err == unix.EINTR {
			continue
		}
		if err != nil {
			return off, os.NewSyscallError("pread", err)
		}
		if n == 0 {
			break
		}
		if !skipZeros {
			err = pwrite(dst, buf[:n], off)
			written = off + int64(n)
		} else {
			for b := 0; b < n && err == nil; b += block {
				part := buf[b:min(b+block, n)]
				if !bytes.Equal(part, zeros[:len(part)]) {
					err = pwrite(dst, part, off+int64(b))
					written = off + int64(b+len(part))
				}
			}
		}
		if err != nil {
			return off, err
		}
		off += int64(n)
		c.bytes.Add(int64(n))
		c.tick()
	}
	return written, nil
}

func pwrite(fd int, buf []byte, off int64) error {
	for len(buf) > 0 {
		n, err := unix.Pwrite(fd, buf, off)
		if err == unix.EINTR {
			continue
		}
		if err != nil {
			return os.NewSyscallError("pwrite", err)
		}
		buf, off = buf[n:], off+int64(n)
	}
	return nil
}

// kernelCopy copies with copy_file_range until end, or until it declines:
// reading and writing goes on from there.
func (c *copier) kernelCopy(dst, src int, off, end int64) (int64, error) {
	for off < end && !c.noCopyRange.Load() {
		if err := c.ctx.Err(); err != nil {
			return off, err
		}
		from, to := off, off
		n, err := unix.CopyFileRange(src, &from, dst, &to, int(min(end-off, chunk)), 0)
		switch {
		case err == unix.EINTR:
			continue
		case errors.Is(err, unix.EXDEV), errors.Is(err, unix.ENOSYS), errors.Is(err, unix.EOPNOTSUPP), errors.Is(err, unix.EINVAL):
			c.noCopyRange.Store(true)
			return off, nil
		case err != nil:
			return off, os.NewSyscallError("copy_file_range", err)
		case n == 0:
			// The end of the source, or a file system that gives nothing
			// this way (procfs and others): read tells.
			return off, nil
		}
		off += int64(n)
		c.bytes.Add(int64(n))
		c.tick()
	}
	return off, nil
}
