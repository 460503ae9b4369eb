package zfs

import (
	"bytes"
	"errors"
	"fmt"
	"strings"
)

// change is a line of zfs diff.
type change struct {
	kind byte   // + - M R
	path string // below the root of the file system, "/" for the root itself
	to   string // R: the new path
}

// String returns the change for people.
func (c change) String() string {
	if c.kind == 'R' {
		return fmt.Sprintf("R %q -> %q", c.path, c.to)
	}
	return fmt.Sprintf("%c %q", c.kind, c.path)
}

// parseDiff parses the output of "zfs diff -FH". Paths begin with the place
// where the file system is mounted, which is one of places.
//
// Each line is kind, type and path, separated by tabs; R has a second path, and
// M of a file whose number of links differs has that difference, "(+1)".
// lib/libzfs/libzfs_diff.c, print_file, print_rename, print_link_change.
func parseDiff(out []byte, places []string) ([]change, error) {
	var list []change
	for line := range bytes.Lines(out) {
		c, err := parseLine(strings.TrimSuffix(string(line), "\n"))
		if err != nil {
			return nil, err
		}
		list = append(list, c)
	}
	return below(list, places)
}

func parseLine(line string) (change, error) {
	fail := func(why string) (change, error) {
		return change{}, fmt.Errorf("zfs diff printed %q: %s", line, why)
	}
	f := strings.Split(line, "\t")
	if len(f) < 3 || len(f[0]) != 1 || len(f[1]) != 1 {
		return fail("no kind, type and path")
	}
	c := change{kind: f[0][0]}
	var err error
	if c.path, err = unescape(f[2]); err != nil {
		return fail(err.Error())
	}
	switch {
	case (c.kind == '+' || c.kind == '-' || c.kind == 'M') && len(f) == 3:
		return c, nil
	case c.kind == 'M' && len(f) == 4 && strings.HasPrefix(f[3], "(") && strings.HasSuffix(f[3], ")"):
		return c, nil
	case c.kind == 'R' && len(f) == 4:
		if c.to, err = unescape(f[3]); err != nil {
			return fail(err.Error())
		}
		return c, nil
	}
	return fail("unknown form")
}

// unescape undoes the escapes of zfs diff: a backslash and four octal digits
// for each byte that is no printable ASCII, and for the backslash (stream_bytes
// in libzfs_diff.c, "\\%04o"). A version that prints three digits is found out
// by the probe of [New].
func unescape(s string) (string, error) {
	if strings.IndexByte(s, '\\') < 0 {
		return s, nil
	}
	var b strings.Builder
	for i := 0; i < len(s); i++ {
		if s[i] != '\\' {
			b.WriteByte(s[i])
			continue
		}
		if i+4 >= len(s) {
			return "", errors.New("short escape")
		}
		n := 0
		for _, c := range s[i+1 : i+5] {
			if c < '0' || c > '7' {
				return "", errors.New("escape is not octal")
			}
			n = n<<3 | int(c-'0')
		}
		if n > 0xff || n == 0 {
			return "", errors.New("escape of no byte")
		}
		b.WriteByte(byte(n))
		i += 4
	}
	return b.String(), nil
}

// escape is the inverse of unescape.
func escape(s string) string {
	var b strings.Builder
	for i := range len(s) {
		if c := s[i]; c > ' ' && c != '\\' && c < 0x7f {
			b.WriteByte(c)
		} else {
			fmt.Fprintf(&b, "\\%04o", c)
		}
	}
	return b.String()
}

// below makes the paths relative to the root of the file system, whatever of
// places zfs has found in the list of mounts.
func below(list []change, places []string) ([]change, error) {
	if len(list) == 0 {
		return nil, nil
	}
	var fit []change
	for _, place := range places {
		cut, ok := cutAll(list, strings.TrimSuffix(place, "/"))
		if !ok {
			continue
		}
		if fit != nil {
			return nil, errors.New("zfs diff prints paths that fit two mounts")
		}
		fit = cut
	}
	if fit == nil {
		return nil, fmt.Errorf("zfs diff prints paths that are in none of %q, such as %v", places, list[0])
	}
	return fit, nil
}

func cutAll(list []change, prefix string) ([]change, bool) {
	out := make([]change, len(list))
	for i, c := range list {
		var ok bool
		if c.path, ok = cutPlace(c.path, prefix); !ok {
			return nil, false
		}
		if c.kind == 'R' {
			if c.to, ok = cutPlace(c.to, prefix); !ok {
				return nil, false
			}
		}
		out[i] = c
	}
	return out, true
}

// cutPlace returns a path below prefix; it has no empty, "." or ".." component.
func cutPlace(path, prefix string) (string, bool) {
	rest, ok := strings.CutPrefix(path, prefix)
	if !ok || rest != "" && rest[0] != '/' {
		return "", false
	}
	if rest == "" || rest == "/" {
		return "/", true
	}
	for part := range strings.SplitSeq(rest[1:], "/") {
		if part == "" || part == "." || part == ".." || strings.IndexByte(part, 0) >= 0 {
			return "", false
		}
	}
	return rest, true
}
