package drivertest

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/layerfs/layerfs"
)

// treeCases are histories: each text is the steps of one layer.
func treeCases() []testCase {
	list := []testCase{
		{name: "Empty", run: history("", "", "")},
		{name: "Files", run: history(
			"dir a\nfile a/f hello\nfile b\ndir empty\nsymlink s a/f\nsymlink broken nowhere\nsymlink abs /a",
			"file a/f changed\nfile new new\nrm b\nrm empty",
			"append a/f more\nrm s\nsymlink s b\nfile b back\nrm abs")},
		// containerd's LayerFileupdate, moby#21555: a file that was changed in
		// each of several layers showed an older content.
		{name: "FileUpdate", run: history(
			"file etc/hosts one\nfile etc/empty",
			"file etc/hosts two",
			"file etc/hosts three\nfile etc/empty not",
			"rm etc/hosts",
			"file etc/hosts four\nfile etc/empty")},
		// moby#25244: a directory of a lower layer that was removed and made
		// again showed its former contents.
		{name: "RemoveDirectoryInLowerLayer", run: history(
			"file lib/hidden x\ndir lib/sub\nfile lib/sub/f y",
			"rm lib\ndir lib 0700\nfile lib/not-hidden z",
			"file lib/new 1\ndir lib/sub")},
		// moby#27298: modes that were changed in a layer were lost in the next.
		{name: "DirectoryPermission", run: history(
			"dir foo 0700\ndir bar 0777\ndir sticky 01777\ndir setgid 02755\ndir bar/sub 0711",
			"chmod foo 0777\nchmod bar/sub 0755\nfile sticky/f 1",
			"chmod sticky 0755\nchmod setgid 0700\nfile foo/f 1")},
		{name: "RootPermission", run: history("chmod . 0711\nfile f 1", "chmod . 01777", "rm f")},
		{name: "Modes", run: history(
			"file f 1\nchmod f 04755\nfile g 2\nchmod g 02711\nfile h 3\nchmod h 01600\nfile i 4\nchmod i 0400",
			"chmod f 0644\nchmod g 0400\nappend h more\nchmod i 0600")},
		{name: "DeletedFilesInChild", run: history(
			"file a/1 1\nfile a/2 2\nfile b/3 3\nfile b/c/4 4",
			"rm a/1\nrm b",
			"file a/1 again",
			"rm a\nfile b/5 5")},
		{name: "MoveFileFromLowerLayer", run: history(
			"file d/f content\nfile d/g other\nsymlink d/s f",
			"rename d/f d/h\nrename d/s s",
			"rename d/h f\nrename d/g d/f")},
		// moby#25409 without the directories, which have a case of their own.
		{name: "RenameNewDirectory", run: history(
			"dir a\nfile a/f 1",
			"dir n\nfile n/f 2\nfile n/sub/g 3\nrename n m\nrename m a/m",
			"file a/m/f 4")},
		{name: "RenameLowerDirectory", run: history(
			"file dir1/f 1\nfile dir1/sub/g 2\ndir somefiles",
			"rename dir1 dir2\nfile dir2/new 3",
			"rename dir2/sub moved\nfile dir2/sub/other 4",
			"rename dir2 dir1\nrm moved")},
		// A directory whose whiteout is replaced by a file and back.
		{name: "DirectoryReplacedByFile", run: history(
			"file a/b/c 1\nfile a/d 2",
			"rm a/b\nfile a/b file",
			"rm a/b\nfile a/b/other 3",
			"rm a\nfile a 4",
			"rm a\nsymlink a target",
			"rm a\ndir a")},
		{name: "FileReplacedByDirectory", run: history(
			"file a 1\nsymlink s a\nfile x/y 2",
			"rm a\ndir a\nfile a/f 3\nrm s\nfile s/t 4",
			"rm a\nfile a 5\nrm s\nsymlink s x")},
		{name: "SymlinkReplacedByDirectory", run: history(
			"file real/f 1\nsymlink link real",
			"rm link\nfile link/g 2",
			"rm link\nsymlink link real")},
		{name: "Opaque", run: history(
			"file d/1 1\nfile d/2 2\nfile d/s/3 3",
			"rm d\nfile d/4 4",
			"rm d\nfile d/1 new\nfile d/s/5 5",
			"rm d/s\ndir d/s",
			"rm d")},
		{name: "RemoveAll", run: history("file a/f 1\nfile b 2", "rm a\nrm b", "file a/f 3")},
		{name: "HardLinks", run: history(
			"file a content\nlink b a\nlink d/c a\nfile e single",
			"file x new\nlink y x\nlink d/z x",
			"rm y\nfile f 1")},
		{name: "HardLinkCounts", run: historyWith(compare{linkCounts: true},
			"file a content\nlink b a\nlink d/c a\nfile e single",
			"rm b",
			"rm a\nlink f d/c")},
		// The copy-up of one name must not tear it from the others.
		{name: "HardLinkAcrossLayers", run: history(
			"file a content\nlink b a\nlink c a",
			"append a more",
			"chmod b 0600",
			"rm c\nlink d b")},
		{name: "HardLinkToLower", run: history(
			"file d/a content",
			"link d/b d/a",
			"link c d/b",
			"rm d/a")},
		{name: "HardLinkBroken", run: history(
			"file a content\nlink b a",
			"rm b\nfile b content",
			"rm a\nlink a b")},
		{name: "HardLinkDirtyNames", run: history(
			"file zz content\nlink aa zz",
			"append zz more\nlink mm zz",
			"rename zz bb")},
		{name: "NanosecondTimes", run: history(
			"file a 1\nmtime a 1000000000.123456789\ndir d\nmtime d 1000000001.000000001\nsymlink s x\nmtime s 1000000002.999999999\nfile neg 1\nmtime neg 1.5\nfile zero\nmtime zero 0",
			"mtime a 1000000000.123456788\nmtime s 1000000002.999999998",
			"file d/f 2\nmtime d 1000000001.000000001\nmtime zero 0.000000001")},
		// What stands in tools that compare size and whole seconds.
		{name: "SameSizeSameTime", run: history(
			"file f aaaa\nmtime f 1000000000\nfile d/g bbbb\nmtime d/g 1000000000.5\nfile h cccc\nmtime h 1000000000",
			"file f AAAA\nmtime f 1000000000\nfile d/g BBBB\nmtime d/g 1000000000.5",
			"append h x\nfile h CCCC\nmtime h 1000000000")},
		{name: "Sparse", run: testSparse},
		{name: "BigFiles", run: history(
			"data big 5000000 1\ndata odd 65537 2\nsparse hole 3@4000000",
			"append big tail\ndata odd 65537 3\nappend hole x",
			"data big 100 4")},
		{name: "Names", run: testNames},
		{name: "DeleteLongNames", run: testDeleteLongNames},
		{name: "LongPaths", run: testLongPaths},
		{name: "ManyFiles", run: testManyFiles},
		{name: "WhiteoutNames", run: testWhiteoutNames},
		{name: "RootNames", run: testRootNames},
		{name: "DeepStack", run: testDeepStack},
		{name: "Fork", run: testFork},
		{name: "AncestorsUntouched", run: testAncestorsUntouched},
	}
	return append(list, linuxTreeCases()...)
}

// testSparse also makes sure that holes stay holes.
func testSparse(e *env) error {
	s := e.newStack(e.d, "layer")
	if err := s.add("sparse a 1M@8M 0@64M", "sparse b 0@16M", "sparse c 64K 64K@1M 64K@2M"); err != nil {
		return err
	}
	if err := s.add("append a x", "chmod b 0600"); err != nil {
		return err
	}
	if err := s.check(); err != nil {
		return err
	}
	info, err := e.d.Stat(e.ctx, s.id(0), &layerfs.StatOptions{Usage: true})
	if err != nil {
		return err
	}
	if info.Usage.Bytes > 16<<20 {
		return fmt.Errorf("files with 1.3 MB of data take %d bytes", info.Usage.Bytes)
	}
	return nil
}

// longestDeleted is the length of the longest name whose whiteout is not longer
// than a name can be.
const longestDeleted = 255 - len(".wh.")

func testNames(e *env) error {
	names := []string{
		"\xff\xfe", "a b", "tab\there", "new\nline", "back\\slash", `quo"te`, "colon:", "com,ma", "per%cent", "*", "?",
		"~", "-dash", "..dots", "...", "trailing ", "ünïcödé", "u\u0308", strings.Repeat("n", 255), strings.Repeat("é", 127), "CON", "a\x01b", "PaxHeaders.0", "=", "a=b",
	}
	if !onLinux() {
		names = []string{"a b", "com,ma", "per%cent", "-dash", "..dots", "ünïcödé", strings.Repeat("n", 200), "=", "a=b"}
	}
	var first, second, third []string
	for i, name := range names {
		q := strconv.Quote(name)
		dir := strconv.Quote("dir-" + name[:min(len(name), 200)] + "/" + name)
		first = append(first, fmt.Sprintf("file %s %d", q, i), fmt.Sprintf("file %s %d", dir, i))
		second = append(second, "append "+q+" x")
		if i%2 == 0 && len(name) <= longestDeleted {
			third = append(third, "rm "+q, "rm "+dir)
		}
	}
	if onLinux() {
		q := strconv.Quote(strings.Repeat("s", 255))
		first = append(first, "symlink "+q+" "+strconv.Quote(strings.Repeat("t/", 500)), "symlink odd "+strconv.Quote("\xff\n"))
		second = append(second, "link "+strconv.Quote(strings.Repeat("l", 255))+" "+strconv.Quote(names[0]))
	}
	s := e.newStack(e.d, "layer")
	for _, steps := range [][]string{first, second, third} {
		if err := s.add(steps...); err != nil {
			return err
		}
	}
	return s.check()
}

// testDeleteLongNames: a name that leaves no room for the prefix of a whiteout.
// A tar stream can hold that all the same.
func testDeleteLongNames(e *env) error {
	var first, second []string
	for n := longestDeleted; n <= 255; n++ {
		name := "d/" + strings.Repeat("n", n)
		first = append(first, "file "+name+" 1")
		second = append(second, "rm "+name)
	}
	return history(strings.Join(first, "\n"), strings.Join(second, "\n"))(e)
}

// testLongPaths: a path that tar has to put into a record of its own.
func testLongPaths(e *env) error {
	long := strings.TrimSuffix(strings.Repeat("0123456789/", 60), "/")
	return history("file "+long+"/f 1\nlink "+long+"/g "+long+"/f\nsymlink l "+long+"\nfile "+long+"/h 2",
		"file "+long+"/h 3\nfile "+long+"/i 4", "rm "+long+"/f")(e)
}

// testManyFiles: a directory that does not fit the buffers of one call.
func testManyFiles(e *env) error {
	var first, second []string
	for i := range 600 {
		first = append(first, fmt.Sprintf("file many/%0150d %d", i, i))
		if i%100 == 0 {
			second = append(second, fmt.Sprintf("rm many/%0150d", i))
		}
	}
	s := e.newStack(e.d, "layer")
	if err := s.add(first...); err != nil {
		return err
	}
	if err := s.add(second...); err != nil {
		return err
	}
	return s.check()
}

// testWhiteoutNames: a container can make files with the names of whiteouts.
// What a driver does with them is its own, but it must not hide or delete
// anything else by it, and must not fail later.
func testWhiteoutNames(e *env) error {
	if err := e.create("a", "", "file keep 1", "file d/keep 2"); err != nil {
		return err
	}
	if err := e.d.Create(e.ctx, "b", "a", nil); err != nil {
		return err
	}
	made := map[string]bool{}
	err := e.with(e.d, "b", nil, func(path string) error {
		for _, name := range []string{".wh.keep", "d/.wh.keep", "d/.wh..wh..opq", ".wh.", ".wh..wh.x"} {
			made[name] = os.WriteFile(filepath.Join(path, name), nil, 0o600) == nil
		}
		return nil
	})
	if err != nil {
		return err
	}
	err = e.with(e.d, "b", nil, func(path string) error {
		for name, wantText := range map[string]string{"keep": "1", "d/keep": "2"} {
			if got, err := readFile(path, name); err != nil || got != wantText {
				return fmt.Errorf("after files with names of whiteouts were made (%v), %s = %q, %v", made, name, got, err)
			}
		}
		return nil
	})
	if err != nil {
		return err
	}
	// As a layer of tar such a file would be a whiteout. So Diff has to leave
	// it out or to fail; a stream that deletes something is wrong.
	if _, err := collect(e.d, e, "b", "a"); err != nil {
		return err
	}
	tar, err := readDiff(e, e.d, "b", "a", nil)
	if err != nil {
		var le *layerfs.Error
		if !errors.As(err, &le) {
			return err
		}
		return nil
	}
	to, err := e.other()
	if err != nil {
		return err
	}
	if err := to.Create(e.ctx, "a", "", nil); err != nil {
		return err
	}
	if err := e.fill(to, "a", "file keep 1", "file d/keep 2"); err != nil {
		return err
	}
	if err := to.Create(e.ctx, "b", "a", nil); err != nil {
		return err
	}
	if _, err := to.Apply(e.ctx, "b", bytes.NewReader(tar), nil); err != nil {
		return err
	}
	return e.with(to, "b", nil, func(path string) error {
		for name, wantText := range map[string]string{"keep": "1", "d/keep": "2"} {
			if got, err := readFile(path, name); err != nil || got != wantText {
				return fmt.Errorf("a file with the name of a whiteout became one: %s = %q, %v", name, got, err)
			}
		}
		return nil
	})
}

// testRootNames: moby#19647, #40939: what has a meaning in mount options.
func testRootNames(e *env) error {
	names := []string{"colon:x", "com,ma", "sp ace", "equal=", "ünïcödé", "per%cent"}
	if onLinux() {
		names = append(names, `back\slash`, "new\nline", `quo"te'`, "tab\t", "\xff", "a:b,c\\:d", `trailing\`)
	}
	for _, name := range names {
		root := filepath.Join(e.newRoot(), name)
		if err := os.Mkdir(root, 0o755); err != nil {
			return err
		}
		d, err := e.open(root)
		if err != nil {
			return fmt.Errorf("root named %q: %w", name, err)
		}
		s := e.newStack(d, "layer")
		for _, steps := range []string{"file f 1\nfile d/g 2", "rm f\nfile h 3", "file f 4"} {
			if err := s.add(lines(steps)...); err != nil {
				return fmt.Errorf("root named %q: %w", name, err)
			}
		}
		if err := s.checkChanges(2, 0); err != nil {
			return fmt.Errorf("root named %q: %w", name, err)
		}
	}
	return nil
}

// testDeepStack: 128LayersMount of containerd's suite.
func testDeepStack(e *env) error {
	depth := 128
	if most := e.d.Features().MaxDepth; most > 0 && most < depth {
		depth = most
	}
	s := e.newStack(e.d, "l")
	for i := range depth {
		steps := []string{fmt.Sprintf("file f%03d %d", i, i), fmt.Sprintf("file last %d", i)}
		if i%10 == 9 {
			steps = append(steps, fmt.Sprintf("rm f%03d", i-5))
		}
		id := s.id(i)
		if err := e.d.Create(e.ctx, id, s.id(i-1), nil); err != nil {
			return fmt.Errorf("layer %d: %w", i+1, err)
		}
		s.steps = append(s.steps, steps)
		err := e.with(e.d, id, nil, func(path string) error {
			if err := makeTree(path, steps...); err != nil {
				return err
			}
			return e.stamp(path, i)
		})
		if err != nil {
			return fmt.Errorf("layer %d: %w", i+1, err)
		}
	}
	for _, i := range []int{depth - 1, depth / 2, 0} {
		if err := s.verify(i); err != nil {
			return err
		}
	}
	for _, base := range []int{depth - 2, depth / 2, 0, -1} {
		if err := s.checkChanges(depth-1, base); err != nil {
			return err
		}
	}
	return nil
}

// testFork: many children on one parent do not see each other.
func testFork(e *env) error {
	if err := e.create("base", "", "file f base", "file g base"); err != nil {
		return err
	}
	const n = 10
	for i := range n {
		id := fmt.Sprintf("c%d", i)
		if err := e.d.Create(e.ctx, id, "base", nil); err != nil {
			return err
		}
		path, err := e.d.Get(e.ctx, id, nil)
		if err != nil {
			return err
		}
		if err := makeTree(path, "file f "+id, "rm g", "file own "+id); err != nil {
			return err
		}
	}
	for i := range n {
		id := fmt.Sprintf("c%d", i)
		if err := e.holds(e.d, id, "f="+id, "own="+id); err != nil {
			return err
		}
	}
	return e.holds(e.d, "base", "f=base", "g=base")
}

// testAncestorsUntouched: nothing that is done above changes a layer.
func testAncestorsUntouched(e *env) error {
	s := e.newStack(e.d, "layer")
	for _, text := range []string{
		"file a 1\nfile d/b 2\nfile d/e/c 3\nlink l a\nsymlink s a",
		"file x 1",
	} {
		if err := s.add(lines(text)...); err != nil {
			return err
		}
	}
	if err := s.add(lines("append a more\nchmod d 0700\nrm d/e\nrm l\nfile s through\nmtime d/b 5")...); err != nil {
		return err
	}
	if err := s.add("rm d", "rm a", "rm x"); err != nil {
		return err
	}
	for i := range s.steps {
		if err := s.verify(i); err != nil {
			return err
		}
	}
	return nil
}
