package zfs

import "strings"

// suspect is a node of a tree of the paths that may differ.
type suspect struct {
	below map[string]*suspect

	// named says that zfs named the path: if it is a directory, its list of
	// names is compared.
	named bool

	// whole says that everything below must be compared: a directory came,
	// went or was replaced here.
	whole bool
}

func newSuspect() *suspect { return new(suspect) }

// note adds a line of zfs diff.
func (s *suspect) note(c change) {
	n := s.at(owner(c.path))
	n.named = true
	n.whole = n.whole || c.kind != 'M'
	if c.kind == 'R' {
		n = s.at(owner(c.to))
		n.named, n.whole = true, true
	}
}

func (s *suspect) at(path string) *suspect {
	for name := range strings.SplitSeq(strings.Trim(path, "/"), "/") {
		if name == "" {
			continue
		}
		next := s.below[name]
		if next == nil {
			next = new(suspect)
			if s.below == nil {
				s.below = make(map[string]*suspect)
			}
			s.below[name] = next
		}
		s = next
	}
	return s
}

// child returns the node of a name, which may be none.
func (s *suspect) child(name string) *suspect {
	if s == nil {
		return nil
	}
	return s.below[name]
}

func (s *suspect) isNamed() bool { return s != nil && s.named }
func (s *suspect) isWhole() bool { return s != nil && s.whole }

// owner returns the file that a path of zfs diff is about: xattrs that are kept
// in files of their own appear below it.
func owner(path string) string {
	if file, _, ok := strings.Cut(path, "/<xattrdir>"); ok {
		if file == "" {
			return "/"
		}
		return file
	}
	return path
}
