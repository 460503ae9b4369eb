package drivertest

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

func linuxTreeCases() []testCase {
	return []testCase{
		// moby#20240, #24913, #28391: owners that were changed in a layer.
		{name: "Chown", needs: needRoot, run: history(
			"dir opt 0700 1:1\nfile opt/a 1\nchown opt/a 1:2\nsymlink s opt/a\nchown s 3:4\nfile caps 1\nchown caps 5:5\nchmod caps 06755",
			"chown opt 0:0\nchown opt/a 4294967294:65534\nchown s 7:8",
			"chown opt/a 1:2\nchown caps 0:0",
			"chown . 10:11")},
		{name: "UnreadableFiles", needs: needRoot, run: history(
			"file f 1\nchmod f 0\nfile d/g 2\nchmod d 0",
			"append f more\nfile d/h 3",
			"rm d/g\nchmod f 0111")},
		{name: "Xattrs", needs: needRoot, run: history(
			"file f 1\nxattr f user.a one\nxattr f user.empty \"\"\nxattr f user.bin 0x00ff0a3d00\nxattr f trusted.t two\nxattr f security.layerfs three\n"+
				"dir d\nxattr d user.d four\nsymlink s f\nxattr s trusted.link five\nxattr . user.root six",
			"xattr f user.a two\nrmxattr f trusted.t\nxattr d user.d five",
			"append f more\nrmxattr d user.d\nxattr s trusted.link six\nrmxattr f user.empty")},
		{name: "UserXattrs", run: history(
			"file f 1\nxattr f user.a one\ndir d\nxattr d user.d four",
			"xattr f user.a two\nxattr f user.b =x=",
			"append f more\nrmxattr d user.d")},
		{name: "LargeXattrs", needs: needRoot, run: history(
			"file f 1\nxattr f user.large "+strings.Repeat("v", 3000), "append f x", "rmxattr f user.large")},
		// Two POSIX ACLs as setfacl(1) makes them: user 1000 may read; new
		// files in d let group 100 write.
		{name: "ACLs", needs: needRoot, run: history(
			"file f 1\nxattr f system.posix_acl_access 0x0200000001000600ffffffff02000400e803000004000400ffffffff10000400ffffffff20000400ffffffff\n"+
				"dir d\nxattr d system.posix_acl_default 0x0200000001000700ffffffff04000500ffffffff080007006400000010000700ffffffff20000500ffffffff",
			"file d/inherits 1\nappend f more",
			"chmod f 0600\nfile d/sub/x 2")},
		// cap_net_raw=ep, version 2.
		{name: "Capabilities", needs: needRoot, run: history(
			"file ping 1\nchmod ping 0755\nxattr ping security.capability 0x0100000200200000000000000000000000000000",
			"chmod ping 0700",
			"rename ping pong",
			"file pong 2")},
		{name: "Specials", needs: needRoot, run: history(
			"char null 1 3 0666\nblock loop 7 200 0600\nchar big 511 262143\nfifo p 0622\ndir dev\nchar dev/zero 1 5",
			"rm null\nfile null now-a-file\nchmod p 0600\nchown dev/zero 1:1",
			"rm loop\nchar loop 1 3\nrm null\nblock null 1 3\nmtime p 77")},
		{name: "Fifos", run: history("fifo p 0622\nfile d/f", "chmod p 0600\nfifo d/q", "rm p\nfile p 1")},
		// moby#12080, on containerd's list: sockets in a layer.
		{name: "UnixSockets", run: testUnixSockets},
		// moby#19647, #12327: the number of a file that is looked at or held
		// open must not change under a program.
		{name: "DirectoryInodeStability", run: testDirectoryInode},
		{name: "OpenFileInodeStability", run: testOpenFileInode},
		{name: "OpenFileSeesWrites", run: testOpenFileSeesWrites},
		// moby#19082, on containerd's list.
		{name: "Getcwd", run: testGetcwd},
		// docker/machine#3327, on containerd's list: chmod of a file of a
		// lower layer while it is open.
		{name: "ChmodOpenFile", run: testChmodOpen},
		// The last of containerd's list.
		{name: "RemoveInsideWalk", run: testRemoveInsideWalk},
		{name: "RenameExchange", run: testRenameExchange},
		{name: "Mmap", run: testMmap},
		{name: "Truncate", run: testTruncate},
	}
}

func testUnixSockets(e *env) error {
	if err := history("sock d/s 0700\nfile f 1", "chmod d/s 0600\nfile g 1", "rm d/s", "sock d/s")(e); err != nil {
		return err
	}
	if err := e.create("live", ""); err != nil {
		return err
	}
	return e.with(e.d, "live", nil, func(path string) error {
		// The path of a socket is short, so it is bound in the directory.
		dir, err := os.Open(path)
		if err != nil {
			return err
		}
		defer dir.Close()
		name := fmt.Sprintf("/proc/self/fd/%d/sock", dir.Fd())
		l, err := net.Listen("unix", name)
		if err != nil {
			return err
		}
		defer l.Close()
		got := make(chan error, 1)
		go func() {
			c, err := l.Accept()
			if err == nil {
				_, err = c.Write([]byte("hello"))
				c.Close()
			}
			got <- err
		}()
		c, err := net.Dial("unix", name)
		if err != nil {
			return err
		}
		defer c.Close()
		b := make([]byte, 5)
		if _, err := c.Read(b); err != nil || string(b) != "hello" {
			return fmt.Errorf("socket in a layer: %q, %v", b, err)
		}
		return <-got
	})
}

func inodeOf(path string) (uint64, error) {
	var st unix.Stat_t
	err := unix.Lstat(path, &st)
	return st.Ino, err
}

func testDirectoryInode(e *env) error {
	if err := errors.Join(e.create("a", "", "file d/f 1"), e.create("b", "a")); err != nil {
		return err
	}
	return e.with(e.d, "b", nil, func(path string) error {
		before, err := inodeOf(filepath.Join(path, "d"))
		if err != nil {
			return err
		}
		if err := makeTree(path, "file d/g 2", "rm d/f", "chmod d 0700"); err != nil {
			return err
		}
		after, err := inodeOf(filepath.Join(path, "d"))
		if err != nil || before != after {
			return fmt.Errorf("a directory had inode %d and has %d after a change: %v", before, after, err)
		}
		return nil
	})
}

func testOpenFileInode(e *env) error {
	if err := errors.Join(e.create("a", "", "file f 1"), e.create("b", "a")); err != nil {
		return err
	}
	return e.with(e.d, "b", nil, func(path string) error {
		f, err := os.Open(filepath.Join(path, "f"))
		if err != nil {
			return err
		}
		defer f.Close()
		var before, after, byName unix.Stat_t
		if err := unix.Fstat(int(f.Fd()), &before); err != nil {
			return err
		}
		if err := makeTree(path, "append f more"); err != nil {
			return err
		}
		if err := errors.Join(unix.Fstat(int(f.Fd()), &after), unix.Stat(filepath.Join(path, "f"), &byName)); err != nil {
			return err
		}
		if before.Ino != after.Ino || before.Ino != byName.Ino || before.Dev != byName.Dev {
			return fmt.Errorf("inode of an open file is %d, was %d, by name %d", after.Ino, before.Ino, byName.Ino)
		}
		return nil
	})
}

// testOpenFileSeesWrites: a file that was opened for reading before the first
// write to it. POSIX wants the new content.
func testOpenFileSeesWrites(e *env) error {
	if err := errors.Join(e.create("a", "", "file f old"), e.create("b", "a")); err != nil {
		return err
	}
	return e.with(e.d, "b", nil, func(path string) error {
		f, err := os.Open(filepath.Join(path, "f"))
		if err != nil {
			return err
		}
		defer f.Close()
		if err := makeTree(path, "file f new"); err != nil {
			return err
		}
		b := make([]byte, 3)
		if _, err := f.ReadAt(b, 0); err != nil || string(b) != "new" {
			return fmt.Errorf("a file opened before the first write reads %q, %v", b, err)
		}
		return nil
	})
}

// testGetcwd asks the kernel for the path of a directory, as getcwd(2) does,
// without changing the directory of this process.
func testGetcwd(e *env) error {
	if err := errors.Join(e.create("a", "", "file d/sub/f 1"), e.create("b", "a")); err != nil {
		return err
	}
	return e.with(e.d, "b", nil, func(path string) error {
		dir := filepath.Join(path, "d/sub")
		f, err := os.Open(dir)
		if err != nil {
			return err
		}
		defer f.Close()
		if err := makeTree(path, "file d/sub/g 2", "chmod d 0711", "rename d/sub/f d/h"); err != nil {
			return err
		}
		got, err := os.Readlink(fmt.Sprintf("/proc/self/fd/%d", f.Fd()))
		if err != nil {
			return err
		}
		if real, err := filepath.EvalSymlinks(dir); err != nil || got != real {
			return fmt.Errorf("an open directory is at %q, want %q, %v", got, real, err)
		}
		return nil
	})
}

func testChmodOpen(e *env) error {
	if err := errors.Join(e.create("a", "", "file f 1"), e.create("b", "a")); err != nil {
		return err
	}
	return e.with(e.d, "b", nil, func(path string) error {
		f, err := os.Open(filepath.Join(path, "f"))
		if err != nil {
			return err
		}
		defer f.Close()
		if err := f.Chmod(0o751); err != nil {
			return err
		}
		fi, err := os.Stat(filepath.Join(path, "f"))
		if err != nil || fi.Mode().Perm() != 0o751 {
			return fmt.Errorf("after fchmod: %v, %v", fi.Mode(), err)
		}
		return nil
	})
}

func testRemoveInsideWalk(e *env) error {
	var steps []string
	for i := range 500 {
		steps = append(steps, fmt.Sprintf("file d%d/f%03d x", i%5, i))
	}
	if err := errors.Join(e.create("a", "", steps...), e.create("b", "a")); err != nil {
		return err
	}
	return e.with(e.d, "b", nil, func(path string) error {
		seen := 0
		err := filepath.WalkDir(path, func(p string, entry fs.DirEntry, err error) error {
			if err != nil || entry.IsDir() {
				return err
			}
			seen++
			return os.Remove(p)
		})
		if err != nil || seen != 500 {
			return fmt.Errorf("a walk that removes what it meets saw %d of 500 files, %v", seen, err)
		}
		for i := range 5 {
			if err := os.Remove(filepath.Join(path, fmt.Sprintf("d%d", i))); err != nil {
				return err
			}
		}
		return dirHolds(path)
	})
}

func testRenameExchange(e *env) error {
	if err := errors.Join(e.create("a", "", "file x 1", "file y 2"), e.create("b", "a")); err != nil {
		return err
	}
	err := e.with(e.d, "b", nil, func(path string) error {
		return unix.Renameat2(unix.AT_FDCWD, filepath.Join(path, "x"), unix.AT_FDCWD, filepath.Join(path, "y"), unix.RENAME_EXCHANGE)
	})
	if errors.Is(err, unix.EINVAL) {
		return skipf("the file system has no RENAME_EXCHANGE")
	}
	return errors.Join(err, e.holds(e.d, "b", "x=2", "y=1"), e.holds(e.d, "a", "x=1", "y=2"))
}

// testMmap: programs are mapped, and so are databases.
func testMmap(e *env) error {
	if err := errors.Join(e.create("a", "", "data f 8192 1"), e.create("b", "a")); err != nil {
		return err
	}
	return e.with(e.d, "b", nil, func(path string) error {
		f, err := os.OpenFile(filepath.Join(path, "f"), os.O_RDWR, 0)
		if err != nil {
			return err
		}
		defer f.Close()
		m, err := unix.Mmap(int(f.Fd()), 0, 8192, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
		if err != nil {
			return err
		}
		copy(m[4000:], "mapped")
		if err := errors.Join(unix.Msync(m, unix.MS_SYNC), unix.Munmap(m)); err != nil {
			return err
		}
		b, err := os.ReadFile(filepath.Join(path, "f"))
		if err != nil || !bytes.Equal(b[4000:4006], []byte("mapped")) {
			return fmt.Errorf("a mapped write is not in the file: %v", err)
		}
		return nil
	})
}

func testTruncate(e *env) error {
	if err := errors.Join(e.create("a", "", "data f 100000 1"), e.create("b", "a")); err != nil {
		return err
	}
	err := e.with(e.d, "b", nil, func(path string) error {
		return syscall.Truncate(filepath.Join(path, "f"), 10)
	})
	if err != nil {
		return err
	}
	for id, size := range map[string]int64{"a": 100000, "b": 10} {
		err := e.with(e.d, id, nil, func(path string) error {
			fi, err := os.Stat(filepath.Join(path, "f"))
			if err == nil && fi.Size() != size {
				err = fmt.Errorf("%s has %d bytes, want %d", id, fi.Size(), size)
			}
			return err
		})
		if err != nil {
			return err
		}
	}
	return nil
}
