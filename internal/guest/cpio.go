package guest

import (
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"strings"
)

// Cpio writes an archive in the "newc" format, the one an initramfs has
// (Documentation/driver-api/early-userspace/buffer-format.rst). Parents are
// made on the way; every file belongs to root. Archives may be concatenated.
// It is not safe for concurrent use.
type Cpio struct {
	w    io.Writer
	off  int64
	ino  uint32
	have map[string]bool
}

// The file type bits of st_mode, as the archive has them on any system.
const (
	modeDir  = 0o040000
	modeReg  = 0o100000
	modeLink = 0o120000
	modeChar = 0o020000
)

// NewCpio returns a writer that has nothing yet.
func NewCpio(w io.Writer) *Cpio {
	return &Cpio{w: w, have: map[string]bool{".": true}}
}

// header writes the entry's fields; size bytes of data follow.
func (c *Cpio) header(name string, mode uint32, size int64, major, minor uint32) error {
	if size >= 1<<32 {
		return fmt.Errorf("cpio: %s: %d bytes do not fit", name, size)
	}
	c.ino++
	nlink := 1
	h := fmt.Sprintf("070701%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%s\x00",
		c.ino, mode, 0, 0, nlink, 0, size, 0, 0, major, minor, len(name)+1, 0, name)
	return c.padded(strings.NewReader(h))
}

// padded copies r and pads to the four bytes that the format wants.
func (c *Cpio) padded(r io.Reader) error {
	n, err := io.Copy(c.w, r)
	if err != nil {
		return err
	}
	c.off += n
	pad := -c.off & 3
	c.off += pad
	_, err = c.w.Write(make([]byte, pad))
	return err
}

// clean returns the name as the archive has it and makes its parents. It is
// "" if the name is there already: the first one wins.
func (c *Cpio) clean(name string) (string, error) {
	name = strings.TrimPrefix(path.Clean("/"+name), "/")
	if name == "" || c.have[name] {
		return "", nil
	}
	if err := c.Dir(path.Dir(name)); err != nil {
		return "", err
	}
	c.have[name] = true
	return name, nil
}

// Dir adds a directory and its parents, mode 0755.
func (c *Cpio) Dir(name string) error {
	if path.Clean(name) == "." {
		return nil
	}
	name, err := c.clean(name)
	if err != nil || name == "" {
		return err
	}
	return c.header(name, modeDir|0o755, 0, 0, 0)
}

// Bytes adds a regular file.
func (c *Cpio) Bytes(name string, data []byte, perm fs.FileMode) error {
	return c.reader(name, strings.NewReader(string(data)), int64(len(data)), perm)
}

func (c *Cpio) reader(name string, r io.Reader, size int64, perm fs.FileMode) error {
	name, err := c.clean(name)
	if err != nil || name == "" {
		return err
	}
	if err := c.header(name, modeReg|uint32(perm.Perm()), size, 0, 0); err != nil {
		return err
	}
	return c.padded(io.LimitReader(r, size))
}

// Symlink adds a symbolic link.
func (c *Cpio) Symlink(name, target string) error {
	name, err := c.clean(name)
	if err != nil || name == "" {
		return err
	}
	if err := c.header(name, modeLink|0o777, int64(len(target)), 0, 0); err != nil {
		return err
	}
	return c.padded(strings.NewReader(target))
}

// Char adds a character device, mode 0600.
func (c *Cpio) Char(name string, major, minor uint32) error {
	name, err := c.clean(name)
	if err != nil || name == "" {
		return err
	}
	return c.header(name, modeChar|0o600, 0, major, minor)
}

// File adds a regular file of the host; symbolic links are followed.
func (c *Cpio) File(name, host string) error {
	f, err := os.Open(host)
	if err != nil {
		return err
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		return err
	}
	if !st.Mode().IsRegular() {
		return fmt.Errorf("cpio: %s is not a regular file", host)
	}
	return c.reader(name, f, st.Size(), st.Mode())
}

// Tree adds a directory of the host with everything below it. Links stay
// links; what is neither file, directory nor link is left out.
func (c *Cpio) Tree(name, host string) error {
	return filepath.WalkDir(host, func(p string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(host, p)
		if err != nil {
			return err
		}
		to := path.Join(name, filepath.ToSlash(rel))
		switch {
		case d.IsDir():
			return c.Dir(to)
		case d.Type()&fs.ModeSymlink != 0:
			target, err := os.Readlink(p)
			if err != nil {
				return err
			}
			return c.Symlink(to, target)
		case d.Type().IsRegular():
			return c.File(to, p)
		}
		return nil
	})
}

// Close ends the archive. It does not close the writer. Another archive may
// follow: the end is padded as the kernel expects.
func (c *Cpio) Close() error {
	if err := c.header("TRAILER!!!", 0, 0, 0, 0); err != nil {
		return err
	}
	_, err := c.w.Write(make([]byte, -c.off&511))
	return err
}
