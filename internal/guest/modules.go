package guest

import (
	"bytes"
	"debug/elf"
	"fmt"
	"io/fs"
	"path/filepath"
	"strings"
)

// ModuleTree finds modules of a kernel by name and knows what each needs.
// It reads the modules themselves: modules.dep is made when a kernel is
// installed, and here none is.
type ModuleTree struct {
	files   map[string]string // name with underscores to path
	builtin map[string]bool
}

// moduleName returns the name of a module file: dashes and underscores mean
// the same (scripts/Makefile.lib, kernel v6.1).
func moduleName(file string) string {
	base, _, _ := strings.Cut(filepath.Base(file), ".ko")
	return strings.ReplaceAll(base, "-", "_")
}

// OpenModules reads the names below the directories; a later directory wins.
// builtin is the content of modules.builtin.
func OpenModules(builtin []byte, dirs ...string) (*ModuleTree, error) {
	t := &ModuleTree{files: map[string]string{}, builtin: map[string]bool{}}
	for line := range strings.Lines(string(builtin)) {
		t.builtin[moduleName(strings.TrimSpace(line))] = true
	}
	for _, dir := range dirs {
		err := filepath.WalkDir(dir, func(p string, d fs.DirEntry, err error) error {
			if err == nil && d.Type().IsRegular() && strings.HasSuffix(p, ".ko") {
				t.files[moduleName(p)] = p
			}
			return err
		})
		if err != nil {
			return nil, err
		}
	}
	return t, nil
}

// Order returns the files of the named modules and of all they need, each
// after what it needs. Built-in ones are left out; an unknown one is an error.
func (t *ModuleTree) Order(names ...string) ([]string, error) {
	var out []string
	state := map[string]int{} // 1: being looked at, 2: listed
	var visit func(name, by string, soft bool) error
	visit = func(name, by string, soft bool) error {
		name = moduleName(name)
		file, ok := t.files[name]
		switch {
		case t.builtin[name] || state[name] == 2:
			return nil
		case !ok && soft:
			return nil // an alias such as crypto-crc32c, or something optional
		case !ok:
			return fmt.Errorf("module %s%s: not in this kernel", name, by)
		case state[name] == 1:
			return fmt.Errorf("module %s%s: needs itself", name, by)
		}
		state[name] = 1
		hard, pre, err := moduleNeeds(file)
		if err != nil {
			return fmt.Errorf("module %s: %w", name, err)
		}
		for _, n := range pre {
			// A soft dependency may be an alias of an algorithm, whose module
			// has the plain name or, in C, that with _generic.
			n = strings.TrimPrefix(n, "crypto-")
			for _, n := range []string{n, n + "_generic"} {
				if err := visit(n, ", needed by "+name, true); err != nil {
					return err
				}
			}
		}
		for _, n := range hard {
			if err := visit(n, ", needed by "+name, false); err != nil {
				return err
			}
		}
		state[name] = 2
		out = append(out, file)
		return nil
	}
	for _, n := range names {
		if err := visit(n, "", false); err != nil {
			return nil, err
		}
	}
	return out, nil
}

// moduleNeeds reads depends= and softdep=pre: from the section .modinfo.
func moduleNeeds(file string) (hard, pre []string, err error) {
	f, err := elf.Open(file)
	if err != nil {
		return nil, nil, err
	}
	defer f.Close()
	sec := f.Section(".modinfo")
	if sec == nil {
		return nil, nil, fmt.Errorf("%s: no section .modinfo", file)
	}
	data, err := sec.Data()
	if err != nil {
		return nil, nil, err
	}
	for field := range bytes.SplitSeq(data, []byte{0}) {
		key, val, _ := strings.Cut(string(field), "=")
		switch key {
		case "depends":
			hard = append(hard, strings.FieldsFunc(val, func(r rune) bool { return r == ',' })...)
		case "softdep":
			before, _, _ := strings.Cut(val, "post:")
			if rest, ok := strings.CutPrefix(before, "pre:"); ok {
				pre = append(pre, strings.Fields(rest)...)
			}
		}
	}
	return hard, pre, nil
}
