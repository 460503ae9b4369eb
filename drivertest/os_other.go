//go:build !linux

package drivertest

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/layerfs/layerfs"
)

// The oracle of other systems knows what package os does: types, contents,
// modes where there are any, modification times and the targets of symlinks.

// errQuota is no error here: nothing limits a layer.
var errQuota = errors.New("quota")

func linuxTreeCases() []testCase    { return nil }
func linuxFeatureCases() []testCase { return nil }

// makeTree makes steps in a tree: dir, file, append, data, sparse, symlink,
// link, chmod, mtime, rm and rename, as internal/tree has them.
func makeTree(root string, steps ...string) error {
	for _, step := range steps {
		words, err := words(step)
		if err == nil {
			err = makeStep(root, words)
		}
		if err != nil {
			return fmt.Errorf("step %q: %w", step, err)
		}
	}
	return nil
}

func words(step string) ([]string, error) {
	var list []string
	for rest := step; rest != ""; rest = strings.TrimLeft(rest, " ") {
		if rest[0] == '"' {
			q, err := strconv.QuotedPrefix(rest)
			if err != nil {
				return nil, err
			}
			w, err := strconv.Unquote(q)
			if err != nil {
				return nil, err
			}
			list, rest = append(list, w), rest[len(q):]
			continue
		}
		if len(list) == 2 && (list[0] == "file" || list[0] == "append") {
			return append(list, rest), nil
		}
		w, r, _ := strings.Cut(rest, " ")
		list, rest = append(list, w), r
	}
	if len(list) < 2 {
		return nil, errors.New("want a verb and a path")
	}
	return append(list, "", ""), nil
}

func makeStep(root string, words []string) error {
	path, arg := filepath.Join(root, words[1]), words[2]
	if verb := words[0]; verb == "dir" || verb == "file" || verb == "data" || verb == "sparse" || verb == "symlink" || verb == "link" {
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			return err
		}
	}
	switch words[0] {
	case "dir":
		if err := os.Mkdir(path, 0o755); err != nil && !errors.Is(err, fs.ErrExist) {
			return err
		}
		return chmod(path, arg, 0o755)
	case "file":
		_, err := os.Lstat(path)
		if werr := os.WriteFile(path, []byte(arg), 0o644); werr != nil || err == nil {
			return werr
		}
		return os.Chmod(path, 0o644)
	case "append":
		f, err := os.OpenFile(path, os.O_WRONLY|os.O_APPEND, 0)
		if err != nil {
			return err
		}
		_, err = f.WriteString(arg)
		return errors.Join(err, f.Close())
	case "data":
		size, err := strconv.Atoi(arg)
		if err != nil {
			return err
		}
		seed, err := strconv.Atoi(words[3])
		if err != nil {
			return err
		}
		data := make([]byte, size)
		for i := range data {
			data[i] = byte(1 + (i*31+seed*17+i>>8)%255)
		}
		return os.WriteFile(path, data, 0o644)
	case "sparse":
		return makeSparse(path, words[2:len(words)-2])
	case "symlink":
		return os.Symlink(arg, path)
	case "link":
		return os.Link(filepath.Join(root, arg), path)
	case "chmod":
		return chmod(path, arg, 0)
	case "mtime":
		sec, frac, _ := strings.Cut(arg, ".")
		s, err := strconv.ParseInt(sec, 10, 64)
		if err != nil {
			return err
		}
		ns, err := strconv.ParseInt((frac + "000000000")[:9], 10, 64)
		if err != nil {
			return err
		}
		if fi, err := os.Lstat(path); err == nil && fi.Mode().Type() == fs.ModeSymlink {
			return nil // Chtimes would follow it
		}
		return os.Chtimes(path, time.Unix(s, ns), time.Unix(s, ns))
	case "rm":
		if _, err := os.Lstat(path); err != nil {
			return err
		}
		return os.RemoveAll(path)
	case "rename":
		return os.Rename(path, filepath.Join(root, arg))
	}
	return fmt.Errorf("verb %q", words[0])
}

func makeSparse(path string, parts []string) error {
	f, err := os.Create(path)
	if err != nil {
		return err
	}
	defer f.Close()
	for _, part := range parts {
		size, off, _ := strings.Cut(part, "@")
		n, at := bytesOf(size), bytesOf(off)
		if n == 0 {
			if err := f.Truncate(at); err != nil {
				return err
			}
			continue
		}
		if _, err := f.WriteAt(bytes.Repeat([]byte{1}, int(n)), at); err != nil {
			return err
		}
	}
	return f.Close()
}

func bytesOf(s string) int64 {
	shift := strings.IndexByte("KMG", (s + " ")[max(len(s)-1, 0)]) + 1
	n, _ := strconv.ParseInt(strings.TrimRight(s, "KMG"), 10, 64)
	return n << (10 * shift)
}

func chmod(path, mode string, def fs.FileMode) error {
	m := uint64(def)
	if mode != "" {
		var err error
		if m, err = strconv.ParseUint(mode, 8, 12); err != nil {
			return err
		}
	}
	fm := fs.FileMode(m & 0o777)
	for bit, flag := range map[uint64]fs.FileMode{0o4000: fs.ModeSetuid, 0o2000: fs.ModeSetgid, 0o1000: fs.ModeSticky} {
		if m&bit != 0 {
			fm |= flag
		}
	}
	return os.Chmod(path, fm)
}

// describe tells what is compared of an entry.
func describe(path string, how compare) (string, error) {
	fi, err := os.Lstat(path)
	if err != nil {
		return "", err
	}
	text := fi.Mode().Type().String()
	if runtime.GOOS != "windows" && fi.Mode().Type() != fs.ModeSymlink {
		text = fi.Mode().String()
	}
	switch t := fi.Mode().Type(); {
	case t == fs.ModeSymlink:
		target, err := os.Readlink(path)
		return text + " " + target, err
	case t.IsRegular():
		b, err := os.ReadFile(path)
		if err != nil {
			return "", err
		}
		text += fmt.Sprintf(" %d %x", len(b), hash(b))
	case t.IsDir() && how.noDirTimes:
		return text, nil
	}
	when := fi.ModTime()
	if how.wholeSeconds {
		when = when.Truncate(time.Second)
	}
	// Microseconds: what every one of these systems can set.
	return text + " " + when.Truncate(100*time.Microsecond).UTC().String(), nil
}

func hash(b []byte) uint64 {
	h := uint64(14695981039346656037)
	for _, c := range b {
		h = (h ^ uint64(c)) * 1099511628211
	}
	return h
}

// scan maps the paths of a tree to their descriptions.
func scan(root string, how compare) (map[string]string, error) {
	out := map[string]string{}
	err := filepath.WalkDir(root, func(path string, _ fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(root, path)
		if err != nil {
			return err
		}
		name := "/" + filepath.ToSlash(rel)
		if rel == "." {
			name = "/"
		}
		out[name], err = describe(path, how)
		return err
	})
	return out, err
}

func compareTrees(wantDir, gotDir string, how compare) error {
	a, err := scan(wantDir, how)
	if err != nil {
		return err
	}
	b, err := scan(gotDir, how)
	if err != nil {
		return err
	}
	var diffs []string
	for path, text := range a {
		if b[path] != text {
			diffs = append(diffs, fmt.Sprintf("\n\t%s: %s != %s", path, text, b[path]))
		}
	}
	for path, text := range b {
		if _, ok := a[path]; !ok {
			diffs = append(diffs, fmt.Sprintf("\n\t%s: absent != %s", path, text))
		}
	}
	if len(diffs) == 0 {
		return nil
	}
	slices.Sort(diffs)
	return fmt.Errorf("want (left) and got (right) differ:%s", strings.Join(diffs[:min(len(diffs), 12)], ""))
}

// walkChanges is the oracle of Changes; see layerfs.Change for the rules.
func walkChanges(base, dir string) ([]layerfs.Change, error) {
	after, err := scan(dir, compare{})
	if err != nil {
		return nil, err
	}
	before := map[string]string{}
	if base != "" {
		if before, err = scan(base, compare{}); err != nil {
			return nil, err
		}
	}
	var list []layerfs.Change
	for path, text := range after {
		was, ok := before[path]
		switch {
		case !ok && path != "/":
			list = append(list, layerfs.Change{Path: path, Kind: layerfs.Added})
		case ok && was != text:
			list = append(list, layerfs.Change{Path: path, Kind: layerfs.Modified})
		}
	}
	for path := range before {
		parent := filepath.ToSlash(filepath.Dir(path))
		if _, ok := after[path]; ok {
			continue
		}
		// Only the top of what was deleted, and nothing of a directory that
		// something else has replaced.
		if above, ok := after[parent]; ok && strings.HasPrefix(above, "d") {
			list = append(list, layerfs.Change{Path: path, Kind: layerfs.Deleted})
		}
	}
	slices.SortFunc(list, func(a, b layerfs.Change) int { return layerfs.ComparePaths(a.Path, b.Path) })
	return list, nil
}

func setTime(path string, t time.Time) error { return os.Chtimes(path, t, t) }

func mountsBelow(string) ([]string, error) { return nil, nil }
func release([]string)                     {}
func openFiles() (int, error)              { return 0, nil }
func linkCount(fs.FileInfo) int            { return 1 }
func noSpace() error                       { return syscall.ENOSPC }

func wantOwners(string, map[string][2]uint32) error { return nil }

func (e *env) tryMounts([]layerfs.Mount, bool, []string) error { return nil }

func limited(fn func() error) error { return fn() }
