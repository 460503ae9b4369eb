//go:build linux

package unionfs

import (
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// join prepares a branch for its permission. A writable one gets the files
// AUFS keeps in its root, and if the last union that had it did not end
// properly, it is searched for what that left.
func (fs *FS) join(b *Branch, skipRepair bool) (done []Repaired, err error) {
	if b.perm != RW {
		return nil, nil
	}
	if err := fs.claim(b); err != nil {
		return nil, err
	}
	fail := func(op string, err error) ([]Repaired, error) {
		b.release()
		return done, &os.PathError{Op: op, Path: b.path, Err: err}
	}
	var st unix.Stat_t
	if fs.aufs {
		if err := refuseRenamed(b); err != nil {
			return fail("branch", err)
		}
	}
	if b.crashed, err = exists(b.root, whMounted, &st); err != nil {
		return fail("fstatat", err)
	}
	if b.crashed && st.Mode&unix.S_IFMT != unix.S_IFREG {
		// Not ours; a hostile branch must not be one that cannot be left.
		if err := removeTree(b.root, whMounted); err != nil {
			return fail("unlinkat", err)
		}
	}
	// What a union keeps in the root of a branch is no change of the root.
	defer keepTimes(b.root)()
	if err := fs.furnish(b); err != nil {
		return fail("prepare", err)
	}
	if b.crashed && !skipRepair {
		err := fs.repairDir(b, b.root, "", &done)
		if err != nil {
			return fail("repair", err)
		}
	}
	if fs.resume == nil {
		if err := fs.emptyOrphans(b, &done); err != nil {
			return fail("repair", err)
		}
	}
	if err := b.mark(); err != nil {
		return fail("openat", err)
	}
	return done, nil
}

// refuseRenamed refuses a branch that AUFS wrote with its option dirren (rule 8
// B7): a directory renamed there goes on merging with the old name below, which
// .wh..wh..dr.* files in it tell, and this engine does not know of. The list in
// the root of the branch is what AUFS itself goes by; without it those files
// mean nothing (aufs dirren.c au_dr_hino, dentry.c).
func refuseRenamed(b *Branch) error {
	var st unix.Stat_t
	ok, err := exists(b.root, whRenamed, &st)
	if ok {
		err = fmt.Errorf("%s: directories were renamed with dirren: %w", whRenamed, unix.EINVAL)
	}
	return err
}

// furnish makes the base of whiteouts and the two directories (rule 2 F6).
func (fs *FS) furnish(b *Branch) error {
	if !fs.aufs {
		return nil
	}
	if err := mkfile(b.root, whBase, 0o444); err != nil {
		return err
	}
	for _, d := range []string{whPlink, whOrphan} {
		if fs.noPlink && d == whPlink {
			if err := removeTree(b.root, d); err != nil && err != unix.ENOENT {
				return err
			}
			continue
		}
		if err := unix.Mkdirat(b.root, d, 0o700); err != nil && err != unix.EEXIST {
			return err
		}
	}
	if fs.noPlink {
		return nil
	}
	if b.plnk >= 0 {
		return nil
	}
	var err error
	b.plnk, err = openDirAt(b.root, whPlink)
	return err
}

// mark notes on the branch that a union has it rw.
func (b *Branch) mark() error {
	defer keepTimes(b.root)()
	return mkfile(b.root, whMounted, 0o444)
}

// unmark takes the note away: all that was written is as it should be.
func (b *Branch) unmark() error {
	defer keepTimes(b.root)()
	if err := unix.Unlinkat(b.root, whMounted, 0); err != nil && err != unix.ENOENT {
		return &os.PathError{Op: "unlinkat", Path: b.path + "/" + whMounted, Err: err}
	}
	return nil
}

// orphanDir opens the directory in which files without a name are made.
func (fs *FS) orphanDir(b *Branch) (int, error) {
	if !fs.aufs {
		return openDirAt(b.root, ".")
	}
	return openDirAt(b.root, whOrphan)
}

func (fs *FS) emptyOrphans(b *Branch, done *[]Repaired) error {
	if !fs.aufs {
		return nil
	}
	d, err := fs.orphanDir(b)
	if err != nil {
		return err
	}
	defer unix.Close(d)
	var names []string
	err = listDir(d, make([]byte, 4<<10), func(e dirent) error {
		names = append(names, e.name)
		return nil
	})
	for _, n := range names {
		if err == nil {
			err = removeTree(d, n)
			*done = append(*done, Repaired{b.path, whOrphan + "/" + n, "removed orphan"})
		}
	}
	return err
}

// repairDir mends the directory fd and those below it.
func (fs *FS) repairDir(b *Branch, fd int, path string, done *[]Repaired) error {
	listed := map[string]uint8{}
	err := listDir(fd, make([]byte, 32<<10), func(e dirent) error {
		listed[e.name] = e.typ
		return nil
	})
	if err != nil {
		return err
	}
	for name, typ := range listed {
		if path == "" && (name == whPlink || name == whOrphan || name == whBase || name == whMounted) {
			continue
		}
		what, err := fs.format.Repair(b, fd, name, listed)
		if err != nil {
			return err
		}
		if what != "" {
			*done = append(*done, Repaired{b.path, path + name, what})
			continue
		}
		if typ != unix.DT_DIR {
			continue
		}
		d, err := openDirAt(fd, name)
		if err == unix.ENOTDIR || err == unix.ELOOP || err == unix.ENOENT {
			continue
		}
		if err != nil {
			return err
		}
		err = fs.repairDir(b, d, path+name+"/", done)
		unix.Close(d)
		if err != nil {
			return err
		}
	}
	return nil
}
