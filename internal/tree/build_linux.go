package tree

import (
	"encoding/hex"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// TB is the part of testing.TB that [Build] needs: package testing must not get
// into programs that only walk.
type TB interface {
	Helper()
	Fatal(args ...any)
}

// Build makes or changes a tree below root, which is made if it is missing,
// and fails the test if that is not possible. See [Make] for the lines.
func Build(tb TB, root string, lines ...string) {
	tb.Helper()
	if err := Make(root, lines...); err != nil {
		tb.Fatal(err)
	}
}

// Make makes or changes a tree below root, one step a line. Words are
// separated by blanks; a word in double quotes is a Go string. Missing parent
// directories are made. What is made gets exactly the given mode, whatever the
// umask; directories 0755 and all others 0644 if there is none.
//
//	dir PATH [MODE [UID:GID]]
//	file PATH [CONTENT]            or truncates and rewrites it
//	append PATH CONTENT
//	data PATH SIZE SEED            pseudo-random bytes
//	sparse PATH SIZE[@OFFSET] ...  data in a file that is otherwise holes; size 0 sets the end
//	symlink PATH TARGET
//	link PATH OLDPATH
//	char|block PATH MAJOR MINOR [MODE]
//	fifo|sock PATH [MODE]
//	chmod PATH MODE
//	chown PATH UID:GID             not following symlinks
//	xattr PATH NAME VALUE          a VALUE 0x… is hexadecimal; likewise
//	rmxattr PATH NAME
//	mtime PATH TIME                RFC 3339, or seconds[.nanoseconds]; done after all other lines
//	touch PATH                     now
//	rm PATH                        and everything below
//	rename PATH NEWPATH
func Make(root string, lines ...string) error {
	if err := os.MkdirAll(root, 0o755); err != nil {
		return err
	}
	var last [][]string
	for _, line := range lines {
		words, err := split(line)
		if err == nil && len(words) >= 3 && words[0] == "mtime" {
			last = append(last, words)
			continue
		}
		if err == nil {
			err = step(root, words)
		}
		if err != nil {
			return fmt.Errorf("tree line %q: %w", line, err)
		}
	}
	for _, words := range last {
		if err := setTime(filepath.Join(root, words[1]), words[2]); err != nil {
			return fmt.Errorf("tree line %q: %w", strings.Join(words, " "), err)
		}
	}
	return nil
}

// split splits a line into words. The last word of a file or append line
// is the rest of the line, unless it is quoted.
func split(line string) ([]string, error) {
	var words []string
	for rest := strings.TrimLeft(line, " "); rest != ""; rest = strings.TrimLeft(rest, " ") {
		if rest[0] == '"' {
			q, err := strconv.QuotedPrefix(rest)
			if err != nil {
				return nil, err
			}
			w, err := strconv.Unquote(q)
			if err != nil {
				return nil, err
			}
			words, rest = append(words, w), rest[len(q):]
			continue
		}
		if len(words) == 2 && (words[0] == "file" || words[0] == "append") {
			return append(words, rest), nil
		}
		w, r, _ := strings.Cut(rest, " ")
		words, rest = append(words, w), r
	}
	if len(words) < 2 {
		return nil, fmt.Errorf("want a verb and a path")
	}
	return words, nil
}

func step(root string, words []string) error {
	verb, path, args := words[0], filepath.Join(root, words[1]), words[2:]
	arg := func(i int) string {
		if i < len(args) {
			return args[i]
		}
		return ""
	}
	mode := func(i int, def uint32) (uint32, error) {
		if i >= len(args) {
			return def, nil
		}
		m, err := strconv.ParseUint(args[i], 8, 12)
		return uint32(m), err
	}
	need := map[string]int{"append": 1, "data": 2, "sparse": 1, "symlink": 1, "link": 1, "char": 2, "block": 2,
		"chmod": 1, "chown": 1, "xattr": 2, "rmxattr": 1, "mtime": 1, "rename": 1}
	if len(args) < need[verb] {
		return fmt.Errorf("%s wants %d words after the path", verb, need[verb])
	}
	switch verb {
	case "chmod", "chown", "xattr", "rmxattr", "touch", "rm", "rename":
	default:
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			return err
		}
	}
	switch verb {
	case "dir":
		if err := os.Mkdir(path, 0o755); err != nil && !os.IsExist(err) {
			return err
		}
		m, err := mode(0, 0o755)
		if err != nil {
			return err
		}
		if len(args) > 1 {
			if err := chown(path, args[1]); err != nil {
				return err
			}
		}
		return unix.Chmod(path, m)
	case "file":
		_, err := os.Lstat(path)
		if werr := os.WriteFile(path, []byte(arg(0)), 0o644); werr != nil || err == nil {
			return werr
		}
		return os.Chmod(path, 0o644)
	case "append":
		f, err := os.OpenFile(path, os.O_WRONLY|os.O_APPEND, 0)
		if err != nil {
			return err
		}
		if _, err := f.WriteString(args[0]); err != nil {
			f.Close()
			return err
		}
		return f.Close()
	case "data", "sparse":
		return writeData(verb, path, args)
	case "symlink":
		return os.Symlink(args[0], path)
	case "link":
		return os.Link(filepath.Join(root, args[0]), path)
	case "char", "block":
		typ := uint32(unix.S_IFCHR)
		if verb == "block" {
			typ = unix.S_IFBLK
		}
		major, err := strconv.ParseUint(args[0], 10, 32)
		if err != nil {
			return err
		}
		minor, err := strconv.ParseUint(args[1], 10, 32)
		if err != nil {
			return err
		}
		m, err := mode(2, 0o644)
		if err != nil {
			return err
		}
		return mknod(path, typ, m, int(unix.Mkdev(uint32(major), uint32(minor))))
	case "fifo", "sock":
		typ := uint32(unix.S_IFIFO)
		if verb == "sock" {
			typ = unix.S_IFSOCK
		}
		m, err := mode(0, 0o644)
		if err != nil {
			return err
		}
		return mknod(path, typ, m, 0)
	case "chmod":
		m, err := mode(0, 0)
		if err != nil {
			return err
		}
		return unix.Chmod(path, m)
	case "chown":
		return chown(path, args[0])
	case "xattr":
		value := []byte(args[1])
		if h, ok := strings.CutPrefix(args[1], "0x"); ok {
			var err error
			if value, err = hex.DecodeString(h); err != nil {
				return err
			}
		}
		if err := unix.Lsetxattr(path, args[0], value, 0); err != nil {
			return &os.PathError{Op: "lsetxattr " + args[0], Path: path, Err: err}
		}
		return nil
	case "rmxattr":
		return unix.Lremovexattr(path, args[0])
	case "touch":
		return unix.UtimesNanoAt(unix.AT_FDCWD, path, []unix.Timespec{{Nsec: unix.UTIME_NOW}, {Nsec: unix.UTIME_NOW}}, unix.AT_SYMLINK_NOFOLLOW)
	case "rm":
		if _, err := os.Lstat(path); err != nil {
			return err
		}
		return os.RemoveAll(path)
	case "rename":
		return os.Rename(path, filepath.Join(root, args[0]))
	}
	return fmt.Errorf("unknown verb %q", verb)
}

func mknod(path string, typ, mode uint32, dev int) error {
	if err := unix.Mknod(path, typ|mode, dev); err != nil {
		return &os.PathError{Op: "mknod", Path: path, Err: err}
	}
	return unix.Chmod(path, mode)
}

func chown(path, owner string) error {
	var uid, gid int
	if _, err := fmt.Sscanf(owner, "%d:%d", &uid, &gid); err != nil {
		return fmt.Errorf("owner %q: %w", owner, err)
	}
	return os.Lchown(path, uid, gid)
}

// writeData writes pseudo-random data, never zero bytes so that it cannot be
// mistaken for a hole, at the places the words name.
func writeData(verb, path string, args []string) error {
	seed := uint64(1)
	if verb == "data" {
		var err error
		if seed, err = strconv.ParseUint(args[1], 10, 64); err != nil {
			return err
		}
		args = args[:1]
	}
	f, err := os.Create(path)
	if err != nil {
		return err
	}
	defer f.Close()
	if err := f.Chmod(0o644); err != nil {
		return err
	}
	rng := rand.New(rand.NewPCG(seed, 0))
	for _, arg := range args {
		s, o, _ := strings.Cut(arg, "@")
		size, err := parseSize(s)
		if err != nil {
			return err
		}
		off, err := parseSize(o)
		if err != nil {
			return err
		}
		if size == 0 {
			if err := f.Truncate(off); err != nil {
				return err
			}
			continue
		}
		buf := make([]byte, size)
		for i := range buf {
			buf[i] = byte(1 + rng.IntN(255))
		}
		if _, err := f.WriteAt(buf, off); err != nil {
			return err
		}
	}
	return f.Close()
}

func parseSize(s string) (int64, error) {
	if s == "" {
		return 0, nil
	}
	shift := 0
	if i := strings.IndexByte("KMGT", s[len(s)-1]); i >= 0 {
		shift = 10 * (i + 1)
		s = s[:len(s)-1]
	}
	n, err := strconv.ParseInt(s, 10, 64)
	return n << shift, err
}

func setTime(path, value string) error {
	var ts unix.Timespec
	if t, err := time.Parse(time.RFC3339Nano, value); err == nil {
		ts = unix.NsecToTimespec(t.UnixNano())
	} else {
		sec, frac, _ := strings.Cut(value, ".")
		s, err := strconv.ParseInt(sec, 10, 64)
		if err != nil {
			return err
		}
		ns, err := strconv.ParseInt((frac + "000000000")[:9], 10, 64)
		if err != nil {
			return err
		}
		if ts, err = unix.TimeToTimespec(time.Unix(s, ns)); err != nil { // beyond 32 bits
			return err
		}
	}
	if err := unix.UtimesNanoAt(unix.AT_FDCWD, path, []unix.Timespec{ts, ts}, unix.AT_SYMLINK_NOFOLLOW); err != nil {
		return &os.PathError{Op: "utimensat", Path: path, Err: err}
	}
	return nil
}
