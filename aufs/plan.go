package aufs

import (
	"fmt"
	"strconv"
	"strings"

	"github.com/layerfs/layerfs/union"
)

// What the kernel's AUFS is told and tells, as strings: aufs(5), aufs-util 4.9,
// and Documentation/ABI/testing/sysfs-aufs. Nothing here makes a system call.

// pageSize is what mount(2) takes of options, the final NUL included.
const pageSize = 4096

// plan is how a layer is mounted.
type plan struct {
	branches []union.Branch // top first
	readOnly bool
	label    string // of SELinux; kernel engine
}

// settings are the options of all mounts of a driver.
type settings struct {
	udba     union.UDBA
	xino     string
	dio      bool
	noPlink  bool
	dirPerm1 bool
	sum      bool
}

// options returns the options that stand behind the branches, in the order
// AUFS applies them in anyway.
func (s settings) options(p plan) string {
	var b strings.Builder
	for _, o := range []struct {
		set  bool
		text string
	}{
		{s.dio, "dio"},
		{s.noPlink, "noplink"},
		{s.dirPerm1, "dirperm1"},
		{s.sum, "sum"},
		{s.xino != "", "xino=" + s.xino},
		{s.udba != "", "udba=" + string(s.udba)},
		{p.label != "", "context=" + strconv.Quote(p.label)},
	} {
		if o.set {
			b.WriteString("," + o.text)
		}
	}
	return b.String()
}

// kernelData returns the data of mount(2), and those of the remounts that add
// the branches which do not fit into a page.
func kernelData(p plan, s settings) (first string, more []string, err error) {
	if len(p.branches) == 0 {
		return "", nil, fmt.Errorf("union without branches")
	}
	if strings.ContainsAny(p.label, "\x00\"") {
		return "", nil, fmt.Errorf("mount label %q has a quote or a NUL byte", p.label)
	}
	options := s.options(p)
	first = "br"
	rest := p.branches
	for len(rest) > 0 {
		text, err := branchText(rest[0])
		if err != nil {
			return "", nil, err
		}
		if len(first)+len(":")+len(text)+len(options) >= pageSize {
			break
		}
		first += ":" + text
		rest = rest[1:]
	}
	if first == "br" {
		return "", nil, fmt.Errorf("options of %d bytes leave no place for a branch: %q", len(options), p.branches[0].Path)
	}
	line := ""
	for _, b := range rest {
		text, err := branchText(b)
		if err != nil {
			return "", nil, err
		}
		verb := "append:" + text
		if len(verb) >= pageSize {
			return "", nil, fmt.Errorf("path of %d bytes does not fit into a page: %q", len(b.Path), b.Path)
		}
		if line != "" && len(line)+len(",")+len(verb) >= pageSize {
			more = append(more, line)
			line = ""
		}
		if line != "" {
			line += ","
		}
		line += verb
	}
	if line != "" {
		more = append(more, line)
	}
	return first + options, more, nil
}

// branchText returns a branch as AUFS is told it, DIR=PERM.
func branchText(b union.Branch) (string, error) {
	if err := checkPath(b.Path); err != nil {
		return "", err
	}
	perm := b.Perm
	if perm == "" {
		perm = union.RO
	}
	return b.Path + "=" + string(perm), nil
}

// checkPath refuses what AUFS's options cannot hold; there is no escape.
func checkPath(path string) error {
	if i := strings.IndexAny(path, ",:=\x00\""); i >= 0 {
		return fmt.Errorf("path %q has %q in it, which options of AUFS cannot hold", path, path[i])
	}
	return nil
}

// verb changes the branches of a mounted union.
type verb struct {
	op string // add, append, mod, del
	at int    // add
	union.Branch
}

// data returns a verb as a remount of AUFS takes it.
func (v verb) data() (string, error) {
	text, err := branchText(v.Branch)
	if err != nil {
		return "", err
	}
	switch v.op {
	case "add":
		return "add:" + strconv.Itoa(v.at) + ":" + text, nil
	case "append", "mod":
		return v.op + ":" + text, nil
	case "del":
		return "del:" + v.Path, nil
	}
	return "", fmt.Errorf("[bug] verb %q", v.op)
}

// parseBranch reads a branch as AUFS tells it in /sys/fs/aufs/si_ID/brN: the
// path may have anything in it but a newline; attributes other than whiteouts
// are dropped.
func parseBranch(text string) (union.Branch, error) {
	text = strings.TrimSuffix(text, "\n")
	i := strings.LastIndexByte(text, '=')
	if i <= 0 || strings.ContainsRune(text, '\n') {
		return union.Branch{}, fmt.Errorf("branch %q is not of the form PATH=PERMISSION", text)
	}
	b := union.Branch{Path: text[:i]}
	perm, attrs, _ := strings.Cut(text[i+1:], "+")
	wh := false
	for a := range strings.SplitSeq(attrs, "+") {
		wh = wh || a == "wh"
	}
	switch {
	case perm == "rw":
		b.Perm = union.RW
	case (perm == "ro" || perm == "rr") && wh:
		b.Perm = union.ROWH
	case perm == "ro":
		b.Perm = union.RO
	case perm == "rr":
		b.Perm = union.RR
	default:
		return union.Branch{}, fmt.Errorf("branch %q has an unknown permission", text)
	}
	return b, nil
}

// parseBranchName returns the index in the name of a file brN.
func parseBranchName(name string) (index int, ok bool) {
	digits, ok := strings.CutPrefix(name, "br")
	if !ok || digits == "" || digits[0] == '+' || digits[0] == '-' {
		return 0, false
	}
	n, err := strconv.Atoi(digits)
	return n, err == nil
}

// superID returns the id of a union in the options that mountinfo shows of it,
// as in "rw,si=9aac41967ae8dbc4,dio".
func superID(options string) (string, bool) {
	for o := range strings.SplitSeq(options, ",") {
		id, ok := strings.CutPrefix(o, "si=")
		if !ok {
			continue
		}
		_, err := strconv.ParseUint(id, 16, 64)
		return id, err == nil
	}
	return "", false
}

// parsePlink reads the name of a pseudo-link, INO.BRANCHINO, and returns the
// inode number of the union.
func parsePlink(name string) (ino uint64, ok bool) {
	up, low, ok := strings.Cut(name, ".")
	if !ok {
		return 0, false
	}
	ino, err := strconv.ParseUint(up, 10, 64)
	_, lerr := strconv.ParseUint(low, 10, 64)
	return ino, err == nil && lerr == nil
}

// hasFS reports whether /proc/filesystems, given as text, has a file system.
func hasFS(list, name string) bool {
	for line := range strings.Lines(list) {
		fields := strings.Fields(line)
		if len(fields) > 0 && fields[len(fields)-1] == name {
			return true
		}
	}
	return false
}

// branchesText tells the branches of a mount to people.
func branchesText(branches []union.Branch) string {
	texts := make([]string, len(branches))
	for i, b := range branches {
		texts[i] = b.Path + "=" + string(b.Perm)
	}
	return strings.Join(texts, ":")
}

// serverSource returns the source of a mount that a process serves.
func serverSource(pidNamespace uint64, pid int) string {
	return fmt.Sprintf("aufs:%d:%d", pidNamespace, pid)
}

// parseSource reads what serverSource made.
func parseSource(source string) (pidNamespace uint64, pid int, ok bool) {
	rest, ok := strings.CutPrefix(source, "aufs:")
	if !ok {
		return 0, 0, false
	}
	ns, id, ok := strings.Cut(rest, ":")
	if !ok {
		return 0, 0, false
	}
	pidNamespace, err := strconv.ParseUint(ns, 10, 64)
	if err != nil {
		return 0, 0, false
	}
	pid, err = strconv.Atoi(id)
	return pidNamespace, pid, err == nil && pid > 0
}

// statusDead reports whether /proc/PID/status, given as text, is that of
// a process that has ended or has SIGKILL pending.
func statusDead(status string) bool {
	const sigkill = 1 << (9 - 1)
	for line := range strings.Lines(status) {
		key, value, _ := strings.Cut(line, ":")
		value = strings.TrimSpace(value)
		switch key {
		case "State":
			if strings.HasPrefix(value, "Z") || strings.HasPrefix(value, "X") {
				return true
			}
		case "SigPnd", "ShdPnd":
			if set, err := strconv.ParseUint(value, 16, 64); err == nil && set&sigkill != 0 {
				return true
			}
		}
	}
	return false
}
