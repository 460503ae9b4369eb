package drivertest

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/klauspost/compress/zstd"

	"github.com/layerfs/layerfs"
)

func streamCases() []testCase {
	return []testCase{
		{name: "DiffErrors", run: testDiffErrors},
		{name: "DiffEmpty", run: testDiffEmpty},
		{name: "DiffSelf", run: testDiffSelf},
		{name: "DiffCompression", run: testDiffCompression},
		{name: "DiffProfileOCI", run: profile(layerfs.ProfileOCI)},
		{name: "DiffProfileReproducible", run: testReproducible},
		{name: "DiffStable", run: testDiffStable},
		{name: "DiffIDMap", needs: needRoot, run: testDiffIDMap},
		{name: "DiffProgress", run: testDiffProgress},
		{name: "DiffReadable", run: testDiffReadable},
		{name: "ChangesErrors", run: testChangesErrors},
		{name: "ChangesSorted", run: testChangesSorted},
		{name: "ApplyResult", run: testApplyResult},
		{name: "ApplyOrder", run: testApplyOrder},
		{name: "ApplyOpaque", run: testApplyOpaque},
		{name: "ApplyHardLinkToLower", run: testApplyHardLinkToLower},
		{name: "ApplyTwice", run: testApplyTwice},
		{name: "ApplyIDMap", needs: needRoot, run: testApplyIDMap},
		{name: "ApplyIgnoreOwners", run: testApplyIgnoreOwners},
		{name: "ApplyEscapes", run: testApplyEscapes},
		{name: "ApplyMalformed", run: testApplyMalformed},
		{name: "ApplyTruncated", run: testApplyTruncated},
		{name: "ApplyLimits", run: testApplyLimits},
		{name: "ApplyReadError", run: testApplyReadError},
		{name: "ApplyCancelled", run: testApplyCancelled},
		{name: "ApplyDevices", run: testApplyDevices},
		{name: "ApplyNoSpace", needs: needSmall, run: testApplyNoSpace},
		{name: "CreateNoSpace", needs: needSmall, run: testCreateNoSpace},
	}
}

// entry is one entry of a stream.
type entry struct {
	name string
	typ  byte
	body string
	link string
	mode int64
	uid  int
}

// makeTar makes a stream as a tool would, by the standard library.
func makeTar(entries ...entry) []byte {
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, e := range entries {
		h := &tar.Header{Name: e.name, Typeflag: e.typ, Linkname: e.link, Size: int64(len(e.body)), Mode: e.mode, ModTime: time.Unix(1e9, 0), Uid: e.uid, Gid: e.uid}
		if e.uid == 0 && os.Geteuid() > 0 {
			h.Uid, h.Gid = os.Geteuid(), os.Getegid()
		}
		if h.Typeflag == 0 {
			h.Typeflag = tar.TypeReg
		}
		if h.Mode == 0 {
			h.Mode = 0o644
			if h.Typeflag == tar.TypeDir {
				h.Mode = 0o755
			}
		}
		if e.typ == tar.TypeChar {
			h.Devmajor, h.Devminor = 1, 3
		}
		if err := w.WriteHeader(h); err != nil {
			panic("[bug] " + err.Error())
		}
		if _, err := io.WriteString(w, e.body); err != nil {
			panic("[bug] " + err.Error())
		}
	}
	if err := w.Close(); err != nil {
		panic("[bug] " + err.Error())
	}
	return b.Bytes()
}

func (e *env) apply(id string, stream []byte) error {
	_, err := e.d.Apply(e.ctx, id, bytes.NewReader(stream), ownFiles())
	return err
}

// ownFiles are options with which a user without privileges can apply a stream
// that implies directories, which would belong to root.
func ownFiles() *layerfs.ApplyOptions {
	return &layerfs.ApplyOptions{IgnoreOwners: os.Geteuid() > 0}
}

func testDiffErrors(e *env) error {
	if err := errors.Join(e.create("a", ""), e.create("b", "a"), e.create("c", "a"), e.create("x", "")); err != nil {
		return err
	}
	for _, c := range []struct {
		id, base string
		target   error
	}{
		{"none", "", layerfs.ErrNotExist},
		{"b", "c", layerfs.ErrNotAncestor},
		{"b", "x", layerfs.ErrNotAncestor},
		{"a", "b", layerfs.ErrNotAncestor},
		{"b", "none", layerfs.ErrNotExist},
	} {
		r, err := e.d.Diff(e.ctx, c.id, c.base, nil)
		if err == nil {
			_, err = r.Read(make([]byte, 1))
			r.Close()
		}
		if err := want(err, "diff", c.id, c.target); err != nil {
			return fmt.Errorf("against %q: %w", c.base, err)
		}
	}
	for _, opts := range []*layerfs.DiffOptions{{Profile: 77}, {Compression: layerfs.Bzip2}, {Compression: 77}} {
		r, err := e.d.Diff(e.ctx, "b", "a", opts)
		if err == nil {
			_, err = io.ReadAll(r)
			r.Close()
		}
		if err == nil {
			return fmt.Errorf("Diff with options %+v: no error", *opts)
		}
	}
	return nil
}

func testDiffEmpty(e *env) error {
	if err := errors.Join(e.create("a", "", "file f 1", "dir d"), e.create("b", "a")); err != nil {
		return err
	}
	list, err := collect(e.d, e, "b", "a")
	if err != nil || len(list) > 0 {
		return fmt.Errorf("changes of an untouched layer: %v, %v", list, err)
	}
	tarBytes, err := readDiff(e, e.d, "b", "a", nil)
	if err != nil {
		return err
	}
	names, err := tarNames(tarBytes)
	if err != nil || len(names) > 0 {
		return fmt.Errorf("diff of an untouched layer has %q, %v", names, err)
	}
	if err := e.create("c", "b"); err != nil {
		return err
	}
	if err := e.apply("c", tarBytes); err != nil {
		return err
	}
	return e.holds(e.d, "c", "f=1", "d")
}

func tarNames(stream []byte) ([]string, error) {
	var names []string
	r := tar.NewReader(bytes.NewReader(stream))
	for {
		h, err := r.Next()
		if err == io.EOF {
			return names, nil
		}
		if err != nil {
			return names, err
		}
		names = append(names, h.Name)
	}
}

// testDiffSelf: a layer against itself is nothing, if it is allowed at all.
func testDiffSelf(e *env) error {
	if err := e.create("a", "", "file f 1"); err != nil {
		return err
	}
	list, err := collect(e.d, e, "a", "a")
	if err != nil {
		return want(err, "changes", "a", layerfs.ErrNotAncestor)
	}
	if len(list) > 0 {
		return fmt.Errorf("changes of a layer against itself: %v", list)
	}
	return nil
}

func testDiffCompression(e *env) error {
	if err := e.create("a", "", "data f 100000 1", "file g 2"); err != nil {
		return err
	}
	// Without access times: reading changes them.
	const profile = layerfs.ProfileOCI
	plain, err := readDiff(e, e.d, "a", "", &layerfs.DiffOptions{Profile: profile})
	if err != nil {
		return err
	}
	for _, c := range []struct {
		opts layerfs.DiffOptions
		open func(io.Reader) (io.Reader, error)
	}{
		{layerfs.DiffOptions{Profile: profile, Compression: layerfs.Gzip}, func(r io.Reader) (io.Reader, error) { return gzip.NewReader(r) }},
		{layerfs.DiffOptions{Profile: profile, Compression: layerfs.Gzip, Level: 9}, func(r io.Reader) (io.Reader, error) { return gzip.NewReader(r) }},
		{layerfs.DiffOptions{Profile: profile, Compression: layerfs.Zstd}, func(r io.Reader) (io.Reader, error) { return zstd.NewReader(r) }},
		{layerfs.DiffOptions{Profile: profile, Compression: layerfs.Zstd, Level: 3}, func(r io.Reader) (io.Reader, error) { return zstd.NewReader(r) }},
	} {
		packed, err := readDiff(e, e.d, "a", "", &c.opts)
		if err != nil {
			return err
		}
		r, err := c.open(bytes.NewReader(packed))
		if err != nil {
			return err
		}
		b, err := io.ReadAll(r)
		if err != nil || !bytes.Equal(b, plain) {
			return fmt.Errorf("%s: %d bytes differ from the %d uncompressed ones, %v", c.opts.Compression, len(b), len(plain), err)
		}
		id := "to-" + c.opts.Compression.String() + fmt.Sprint(c.opts.Level)
		if err := e.create(id, ""); err != nil {
			return err
		}
		res, err := e.d.Apply(e.ctx, id, bytes.NewReader(packed), nil)
		if err != nil {
			return err
		}
		if sum := sha256.Sum256(plain); res.Digest != "sha256:"+hex.EncodeToString(sum[:]) {
			return fmt.Errorf("%s: digest %s is not that of the uncompressed stream", c.opts.Compression, res.Digest)
		}
	}
	return nil
}

func profile(p layerfs.Profile) caseFunc {
	return func(e *env) error {
		s := e.newStack(e.d, "layer")
		for _, text := range []string{
			"file a 1\ndir d 0700\nfile d/b 2\nlink d/c d/b\nsymlink s a\nsparse big 4096@1M",
			"append a x\nrm d/b\nfile new 3",
			"rm d\nfile d 4",
		} {
			if err := s.add(lines(text)...); err != nil {
				return err
			}
		}
		return s.checkDiffs(&layerfs.DiffOptions{Profile: p})
	}
}

// testReproducible: equal trees made at different times give equal bytes, and
// no time is later than asked for.
func testReproducible(e *env) error {
	opts := &layerfs.DiffOptions{Profile: layerfs.ProfileReproducible, SourceDate: time.Unix(1e9, 0)}
	steps := lines("file z 1\nfile a 2\ndir d\nfile d/f 3\nlink l a\nsymlink s a\nmtime a 5.123")
	sums := make([][]byte, 0, 2)
	for _, id := range []string{"one", "two"} {
		if err := e.create(id, "", steps...); err != nil {
			return err
		}
		slices.Reverse(steps[:2])
		b, err := readDiff(e, e.d, id, "", opts)
		if err != nil {
			return err
		}
		sums = append(sums, b)
	}
	if !bytes.Equal(sums[0], sums[1]) {
		return errors.New("two equal trees give different streams")
	}
	r := tar.NewReader(bytes.NewReader(sums[0]))
	for {
		h, err := r.Next()
		if err == io.EOF {
			return nil
		}
		if err != nil {
			return err
		}
		if h.ModTime.After(opts.SourceDate) || h.ModTime.Nanosecond() != 0 || !h.AccessTime.IsZero() || h.Uname != "" {
			return fmt.Errorf("entry %s: %+v", h.Name, h)
		}
	}
}

// testDiffStable: a layer that is not changed gives the same stream each time.
func testDiffStable(e *env) error {
	if err := errors.Join(e.create("a", "", "file f 1", "dir d", "file d/g 2"), e.create("b", "a", "rm f", "file h 3", "file d/i 4")); err != nil {
		return err
	}
	first, err := readDiff(e, e.d, "b", "a", &layerfs.DiffOptions{Profile: layerfs.ProfileOCI})
	if err != nil {
		return err
	}
	for range 3 {
		if err := e.holds(e.d, "b", "d", "h=3"); err != nil {
			return err
		}
		again, err := readDiff(e, e.d, "b", "a", &layerfs.DiffOptions{Profile: layerfs.ProfileOCI})
		if err != nil {
			return err
		}
		if !bytes.Equal(first, again) {
			return errors.New("the stream of an unchanged layer has changed")
		}
	}
	return nil
}

var someMap = &layerfs.IDMap{
	UIDs: []layerfs.IDRange{{ContainerID: 0, HostID: 100000, Size: 65536}},
	GIDs: []layerfs.IDRange{{ContainerID: 0, HostID: 200000, Size: 65536}},
}

func testDiffIDMap(e *env) error {
	if err := e.create("a", "", "file f 1", "chown f 100007:200008", "chown . 100000:200000"); err != nil {
		return err
	}
	b, err := readDiff(e, e.d, "a", "", &layerfs.DiffOptions{IDMap: someMap})
	if err != nil {
		return err
	}
	r := tar.NewReader(bytes.NewReader(b))
	for {
		h, err := r.Next()
		if err != nil {
			return fmt.Errorf("no entry f: %w", err)
		}
		if filepath.Clean(h.Name) == "f" {
			if h.Uid != 7 || h.Gid != 8 {
				return fmt.Errorf("owner in the stream is %d:%d, want 7:8", h.Uid, h.Gid)
			}
			return nil
		}
	}
}

func testApplyIDMap(e *env) error {
	stream := makeTar(entry{name: "d/", typ: tar.TypeDir, uid: 7}, entry{name: "d/f", body: "1", uid: 8}, entry{name: "implied/f", body: "2"})
	if err := e.create("a", ""); err != nil {
		return err
	}
	if _, err := e.d.Apply(e.ctx, "a", bytes.NewReader(stream), &layerfs.ApplyOptions{IDMap: someMap}); err != nil {
		return err
	}
	err := e.with(e.d, "a", nil, func(path string) error {
		return wantOwners(path, map[string][2]uint32{"d": {100007, 200007}, "d/f": {100008, 200008}, "implied": {100000, 200000}})
	})
	if err != nil {
		return err
	}
	if err := e.create("b", ""); err != nil {
		return err
	}
	stream = makeTar(entry{name: "f", body: "1", uid: 70000})
	_, err = e.d.Apply(e.ctx, "b", bytes.NewReader(stream), &layerfs.ApplyOptions{IDMap: someMap})
	if err == nil {
		return errors.New("an owner outside of the map was applied")
	}
	return e.usable("b")
}

func testApplyIgnoreOwners(e *env) error {
	if err := e.create("a", ""); err != nil {
		return err
	}
	stream := makeTar(entry{name: "f", body: "1", uid: 4711})
	if _, err := e.d.Apply(e.ctx, "a", bytes.NewReader(stream), &layerfs.ApplyOptions{IgnoreOwners: true}); err != nil {
		return err
	}
	return e.with(e.d, "a", nil, func(path string) error {
		return wantOwners(path, map[string][2]uint32{"f": {uint32(os.Geteuid()), uint32(os.Getegid())}})
	})
}

func testDiffProgress(e *env) error {
	if err := e.create("a", "", "data f 2000000 1", "dir d"); err != nil {
		return err
	}
	var last layerfs.Progress
	b, err := readDiff(e, e.d, "a", "", &layerfs.DiffOptions{Progress: func(p layerfs.Progress) { last = p }})
	if err != nil {
		return err
	}
	if last.Bytes < 2000000 || last.Entries < 2 {
		return fmt.Errorf("progress of Diff ended with %+v", last)
	}
	if err := e.create("b", ""); err != nil {
		return err
	}
	last = layerfs.Progress{}
	if _, err := e.d.Apply(e.ctx, "b", bytes.NewReader(b), &layerfs.ApplyOptions{Progress: func(p layerfs.Progress) { last = p }}); err != nil {
		return err
	}
	if last.Bytes < 2000000 || last.Entries < 2 {
		return fmt.Errorf("progress of Apply ended with %+v", last)
	}
	return nil
}

// testDiffReadable lets the standard library read what Diff writes: whiteouts
// are explicit or opaque, and names relative.
func testDiffReadable(e *env) error {
	if err := errors.Join(e.create("a", "", "file f 1", "file d/g 2"), e.create("b", "a", "rm f", "rm d/g", "file d/h 3")); err != nil {
		return err
	}
	b, err := readDiff(e, e.d, "b", "a", &layerfs.DiffOptions{Profile: layerfs.ProfileOCI})
	if err != nil {
		return err
	}
	names, err := tarNames(b)
	if err != nil {
		return err
	}
	for _, name := range []string{".wh.f", "d/.wh.g", "d/h"} {
		if !slices.Contains(names, name) {
			return fmt.Errorf("the stream has %q, not %q", names, name)
		}
	}
	return nil
}

func testChangesErrors(e *env) error {
	if err := errors.Join(e.create("a", ""), e.create("b", "a"), e.create("c", "a")); err != nil {
		return err
	}
	_, notExist := collect(e.d, e, "none", "")
	_, notAncestor := collect(e.d, e, "b", "c")
	_, reversed := collect(e.d, e, "a", "b")
	return errors.Join(
		want(notExist, "changes", "none", layerfs.ErrNotExist),
		want(notAncestor, "changes", "b", layerfs.ErrNotAncestor),
		want(reversed, "changes", "a", layerfs.ErrNotAncestor),
	)
}

func testChangesSorted(e *env) error {
	if err := e.create("a", "", "file a/b 1", "file a-b 2", "file a.b 3", "file a/b-c 4", "file ab 5", "dir a/b.d", "file a/b.d/e 6"); err != nil {
		return err
	}
	list, err := collect(e.d, e, "a", "")
	if err != nil {
		return err
	}
	if !slices.IsSortedFunc(list, func(x, y layerfs.Change) int { return layerfs.ComparePaths(x.Path, y.Path) }) || len(list) != 8 {
		return fmt.Errorf("changes %q are not 8 in order", list)
	}
	return nil
}

func testApplyResult(e *env) error {
	stream := makeTar(entry{name: "./", typ: tar.TypeDir}, entry{name: "./f", body: "hello"}, entry{name: "./d/", typ: tar.TypeDir, mode: 0o700}, entry{name: "./.wh.gone"})
	sum := sha256.Sum256(stream)
	wantRes := layerfs.ApplyResult{Size: int64(len(stream)), Bytes: 5, Entries: 4, Digest: "sha256:" + hex.EncodeToString(sum[:])}
	var packed bytes.Buffer
	w := gzip.NewWriter(&packed)
	if _, err := w.Write(stream); err != nil {
		return err
	}
	if err := w.Close(); err != nil {
		return err
	}
	for id, s := range map[string][]byte{"plain": stream, "gzip": packed.Bytes()} {
		if err := e.create(id, ""); err != nil {
			return err
		}
		res, err := e.d.Apply(e.ctx, id, bytes.NewReader(s), nil)
		if err != nil {
			return err
		}
		if res != wantRes {
			return fmt.Errorf("%s: Apply = %+v, want %+v", id, res, wantRes)
		}
		if err := e.holds(e.d, id, "f=hello", "d"); err != nil {
			return err
		}
	}
	_, err := e.d.Apply(e.ctx, "none", bytes.NewReader(stream), nil)
	return want(err, "apply", "none", layerfs.ErrNotExist)
}

// testApplyOrder: links before their targets, files before their directories,
// whiteouts after what the same layer puts in place.
func testApplyOrder(e *env) error {
	if err := errors.Join(e.create("a", "", "file d/old 1", "file f old"), e.create("b", "a")); err != nil {
		return err
	}
	err := e.apply("b", makeTar(
		entry{name: "d/new", body: "2"},
		entry{name: "link", typ: tar.TypeLink, link: "z/target"},
		entry{name: "f", body: "new"},
		entry{name: ".wh.f"},
		entry{name: "d/.wh..wh..opq"},
		entry{name: "z/target", body: "t"},
		entry{name: "z/", typ: tar.TypeDir, mode: 0o711},
		entry{name: "d/", typ: tar.TypeDir, mode: 0o700},
	))
	if err != nil {
		return err
	}
	return e.with(e.d, "b", nil, func(path string) error {
		if err := errors.Join(dirHolds(path, "d", "f=new", "link=t", "z"), dirHolds(filepath.Join(path, "d"), "new=2"), dirHolds(filepath.Join(path, "z"), "target=t")); err != nil {
			return err
		}
		if !onLinux() {
			return nil
		}
		for name, mode := range map[string]os.FileMode{"d": 0o700, "z": 0o711} {
			if fi, err := os.Stat(filepath.Join(path, name)); err != nil || fi.Mode().Perm() != mode {
				return fmt.Errorf("%s: %v, %v", name, fi.Mode(), err)
			}
		}
		return nil
	})
}

func testApplyOpaque(e *env) error {
	if err := errors.Join(
		e.create("a", "", "file d/1 1", "file d/s/2 2", "file top 3"),
		e.create("b", "a"), e.create("c", "a"), e.create("d", "a")); err != nil {
		return err
	}
	if err := errors.Join(
		e.apply("b", makeTar(entry{name: "d/", typ: tar.TypeDir}, entry{name: "d/.wh..wh..opq"}, entry{name: "d/s/", typ: tar.TypeDir})),
		e.apply("c", makeTar(entry{name: ".wh..wh..opq"}, entry{name: "only", body: "1"})),
		e.apply("d", makeTar(entry{name: ".wh.d"}, entry{name: ".wh.none"}, entry{name: "none/.wh.x"})),
	); err != nil {
		return err
	}
	return errors.Join(
		e.with(e.d, "b", nil, func(path string) error {
			return errors.Join(dirHolds(path, "d", "top=3"), dirHolds(filepath.Join(path, "d"), "s"), dirHolds(filepath.Join(path, "d/s")))
		}),
		e.holds(e.d, "c", "only=1"),
		e.with(e.d, "d", nil, func(path string) error {
			if _, err := os.Lstat(filepath.Join(path, "d")); err == nil {
				return errors.New("a whiteout did not delete")
			}
			if _, err := os.Lstat(filepath.Join(path, ".wh.none")); err == nil {
				return errors.New("a whiteout shows")
			}
			return nil
		}),
	)
}

func testApplyHardLinkToLower(e *env) error {
	if err := errors.Join(e.create("a", "", "file d/f content"), e.create("b", "a")); err != nil {
		return err
	}
	if err := e.apply("b", makeTar(entry{name: "link", typ: tar.TypeLink, link: "d/f"})); err != nil {
		return err
	}
	return errors.Join(e.holds(e.d, "b", "d", "link=content"), e.holds(e.d, "a", "d"))
}

func testApplyTwice(e *env) error {
	if err := e.create("a", ""); err != nil {
		return err
	}
	if err := errors.Join(
		e.apply("a", makeTar(entry{name: "f", body: "1"}, entry{name: "d/g", body: "2"})),
		e.apply("a", makeTar(entry{name: "f", body: "3"}, entry{name: "d/.wh.g"}, entry{name: "h", body: "4"})),
	); err != nil {
		return err
	}
	return e.holds(e.d, "a", "d", "f=3", "h=4")
}

// usable makes sure that a failed Apply has left a layer as it was, which was
// empty, or incomplete so that it can only be removed.
func (e *env) usable(id string) error {
	info, err := e.d.Stat(e.ctx, id, nil)
	if err != nil {
		return err
	}
	if info.Incomplete == "" {
		if err := e.holds(e.d, id); err != nil {
			return fmt.Errorf("a failed Apply left something: %w", err)
		}
		return e.d.Remove(e.ctx, id)
	}
	_, getErr := e.d.Get(e.ctx, id, nil)
	_, diffErr := e.d.Diff(e.ctx, id, "", nil)
	_, changesErr := collect(e.d, e, id, "")
	_, applyErr := e.d.Apply(e.ctx, id, bytes.NewReader(makeTar()), nil)
	return errors.Join(
		want(getErr, "get", id, layerfs.ErrIncomplete),
		want(diffErr, "diff", id, layerfs.ErrIncomplete),
		want(changesErr, "changes", id, layerfs.ErrIncomplete),
		want(applyErr, "apply", id, layerfs.ErrIncomplete),
		want(e.d.Create(e.ctx, "on-incomplete", id, nil), "create", "on-incomplete", layerfs.ErrIncomplete),
		e.d.Remove(e.ctx, id),
	)
}

// refuses makes sure that a stream is refused, on an empty layer and on one
// that holds something.
func (e *env) refuses(stream []byte, opts *layerfs.ApplyOptions, targets ...error) error {
	if err := e.create("bad", ""); err != nil {
		return err
	}
	_, err := e.d.Apply(e.ctx, "bad", bytes.NewReader(stream), opts)
	if err := want(err, "apply", "bad", targets...); err != nil {
		return err
	}
	if err := e.usable("bad"); err != nil {
		return err
	}
	if err := e.create("bad", "", "file kept 1"); err != nil {
		return err
	}
	_, err = e.d.Apply(e.ctx, "bad", bytes.NewReader(stream), opts)
	if err := want(err, "apply", "bad", targets...); err != nil {
		return err
	}
	info, err := e.d.Stat(e.ctx, "bad", nil)
	if err != nil {
		return err
	}
	if info.Incomplete == "" {
		if err := e.holds(e.d, "bad", "kept=1"); err != nil {
			return fmt.Errorf("a failed Apply changed a layer without saying so: %w", err)
		}
	}
	return e.d.Remove(e.ctx, "bad")
}

// testApplyEscapes: whatever a stream says, nothing outside is touched.
func testApplyEscapes(e *env) error {
	outside := filepath.Join(filepath.Dir(e.root), "outside")
	if err := os.Mkdir(outside, 0o755); err != nil {
		return err
	}
	secret := filepath.Join(outside, "secret")
	if err := os.WriteFile(secret, []byte("secret"), 0o600); err != nil {
		return err
	}
	up := "../../../../../../../../../../../.." + outside
	dir, link, hard := byte(tar.TypeDir), byte(tar.TypeSymlink), byte(tar.TypeLink)
	for i, entries := range [][]entry{
		{{name: up + "/new", body: "x"}},
		{{name: outside + "/new", body: "x"}},
		{{name: "l", typ: link, link: outside}, {name: "l/new", body: "x"}},
		{{name: "l", typ: link, link: up}, {name: "l/new", body: "x"}},
		{{name: "l", typ: link, link: outside}, {name: "l/sub/", typ: dir}, {name: "l/sub/f", body: "x"}},
		{{name: "l", typ: link, link: secret}, {name: "l", body: "x"}},
		{{name: "h", typ: hard, link: secret}},
		{{name: "h", typ: hard, link: up + "/secret"}, {name: "h", body: "x"}},
		{{name: "l", typ: link, link: outside}, {name: "h", typ: hard, link: "l/secret"}},
		{{name: "l", typ: link, link: outside}, {name: "l/.wh.secret"}},
		{{name: "l", typ: link, link: outside}, {name: "l/.wh..wh..opq"}},
		{{name: up + "/.wh.secret"}},
		{{name: ".wh..."}, {name: "d/.wh.."}, {name: ".wh."}},
		{{name: "d/.wh...", body: ""}},
		{{name: "l", typ: link, link: ".."}, {name: "l/../../x", body: "x"}},
	} {
		id := fmt.Sprintf("escape%d", i)
		if err := e.create(id, "", "file kept 1"); err != nil {
			return err
		}
		err := e.apply(id, makeTar(entries...))
		var le *layerfs.Error
		if err != nil && !errors.As(err, &le) {
			return fmt.Errorf("stream %d: %w", i, err)
		}
		if err := dirHolds(outside, "secret=secret"); err != nil {
			return fmt.Errorf("stream %d reached outside: %w", i, err)
		}
		if err == nil {
			// It was applied inside; then no name of it may give the secret away.
			err := e.with(e.d, id, nil, func(path string) error {
				fi, err := os.Lstat(filepath.Join(path, "h"))
				if err == nil && fi.Mode().IsRegular() {
					if b, _ := readFile(path, "h"); b == "secret" {
						return fmt.Errorf("stream %d: a hard link reached outside", i)
					}
				}
				return nil
			})
			if err != nil {
				return err
			}
		}
	}
	return nil
}

func testApplyMalformed(e *env) error {
	good := makeTar(entry{name: "f", body: "hello"}, entry{name: "g", body: "world"})
	header := bytes.Clone(good)
	header[1024+5] ^= 0xff // in the name of the second entry: its checksum is wrong
	var packed bytes.Buffer
	w := gzip.NewWriter(&packed)
	if _, err := w.Write(good); err != nil {
		return err
	}
	if err := w.Close(); err != nil {
		return err
	}
	corrupt := bytes.Clone(packed.Bytes())
	corrupt[len(corrupt)-6] ^= 0xff // its CRC
	zst := append([]byte{0x28, 0xb5, 0x2f, 0xfd}, bytes.Repeat([]byte{0xff}, 64)...)
	for name, stream := range map[string][]byte{
		"garbage":           bytes.Repeat([]byte("no tar at all "), 1000),
		"header checksum":   header,
		"gzip checksum":     corrupt,
		"gzip cut":          packed.Bytes()[:packed.Len()/2],
		"zstd garbage":      zst,
		"whiteout of self":  makeTar(entry{name: "a", body: "1"}, entry{name: ".wh."}),
		"hard link nowhere": makeTar(entry{name: "a", body: "1"}, entry{name: "b", typ: tar.TypeLink, link: "none"}),
	} {
		if err := e.refuses(stream, nil, layerfs.ErrMalformed); err != nil {
			return fmt.Errorf("%s: %w", name, err)
		}
	}
	return nil
}

func testApplyTruncated(e *env) error {
	stream := makeTar(entry{name: "d/", typ: tar.TypeDir}, entry{name: "d/f", body: string(bytes.Repeat([]byte("x"), 5000))}, entry{name: "g", body: "last"})
	for _, n := range []int{1, 511, 513, 1024, 1500, 3000, 7000} {
		err := e.refuses(stream[:n], nil)
		if n%512 == 0 && err != nil {
			// Some tools leave the end mark out, so a cut between two entries
			// may pass; it must then be a whole prefix of the layer.
			continue
		}
		if err != nil {
			return fmt.Errorf("cut at %d: %w", n, err)
		}
	}
	return nil
}

func testApplyLimits(e *env) error {
	long := string(bytes.Repeat([]byte("n/"), 300)) + "f"
	var bomb bytes.Buffer
	w := gzip.NewWriter(&bomb)
	zeros := make([]byte, 1<<20)
	h := tar.NewWriter(w)
	if err := h.WriteHeader(&tar.Header{Name: "bomb", Mode: 0o644, Size: 200 << 20}); err != nil {
		return err
	}
	for range 200 {
		if _, err := h.Write(zeros); err != nil {
			return err
		}
	}
	if err := errors.Join(h.Close(), w.Close()); err != nil {
		return err
	}
	for name, c := range map[string]struct {
		stream []byte
		limits layerfs.Limits
	}{
		"bytes":   {makeTar(entry{name: "f", body: "12345"}, entry{name: "g", body: "678901"}), layerfs.Limits{Bytes: 10}},
		"entries": {makeTar(entry{name: "f"}, entry{name: "g"}, entry{name: "h"}), layerfs.Limits{Entries: 2}},
		"path":    {makeTar(entry{name: long, body: "1"}), layerfs.Limits{PathLength: 100}},
		"ratio":   {bomb.Bytes(), layerfs.Limits{Ratio: 100}},
	} {
		if err := e.refuses(c.stream, &layerfs.ApplyOptions{Limits: c.limits}, layerfs.ErrLimit); err != nil {
			return fmt.Errorf("limit of %s: %w", name, err)
		}
	}
	if err := e.create("ok", ""); err != nil {
		return err
	}
	exact := &layerfs.ApplyOptions{Limits: layerfs.Limits{Bytes: 5, Entries: 1, PathLength: 1}}
	if _, err := e.d.Apply(e.ctx, "ok", bytes.NewReader(makeTar(entry{name: "f", body: "12345"})), exact); err != nil {
		return fmt.Errorf("a stream that just keeps its limits: %w", err)
	}
	return nil
}

// testApplyReadError: what the caller's reader says gets through.
func testApplyReadError(e *env) error {
	stream := makeTar(entry{name: "f", body: string(bytes.Repeat([]byte("x"), 100000))})
	boom := errors.New("boom")
	if err := e.create("a", ""); err != nil {
		return err
	}
	r := io.MultiReader(bytes.NewReader(stream[:60000]), &failing{err: boom})
	_, err := e.d.Apply(e.ctx, "a", r, nil)
	if err := want(err, "apply", "a", boom); err != nil {
		return err
	}
	return e.usable("a")
}

type failing struct{ err error }

func (f *failing) Read([]byte) (int, error) { return 0, f.err }

// testApplyCancelled: a context that ends while the reader is stuck.
func testApplyCancelled(e *env) error {
	stream := makeTar(entry{name: "f", body: string(bytes.Repeat([]byte("x"), 100000))})
	if err := e.create("a", ""); err != nil {
		return err
	}
	ctx, cancel := context.WithCancel(e.ctx)
	pr, pw := io.Pipe()
	defer pw.Close()
	go func() {
		_, _ = pw.Write(stream[:50000])
		cancel()
	}()
	done := make(chan error, 1)
	go func() {
		_, err := e.d.Apply(ctx, "a", pr, nil)
		done <- err
	}()
	select {
	case err := <-done:
		if err := want(err, "apply", "a", context.Canceled); err != nil {
			return err
		}
	case <-time.After(20 * time.Second):
		return errors.New("Apply did not end with its context")
	}
	pw.Close()
	return e.usable("a")
}

func testApplyDevices(e *env) error {
	stream := makeTar(entry{name: "f", body: "1"}, entry{name: "null", typ: tar.TypeChar})
	apply := func(id string, p layerfs.DevicePolicy) (layerfs.ApplyResult, error) {
		if err := e.create(id, ""); err != nil {
			return layerfs.ApplyResult{}, err
		}
		return e.d.Apply(e.ctx, id, bytes.NewReader(stream), &layerfs.ApplyOptions{Devices: p})
	}
	res, err := apply("skip", layerfs.DevicesSkip)
	if err != nil || res.Skipped != 1 {
		return fmt.Errorf("skip: %+v, %v", res, err)
	}
	if err := e.holds(e.d, "skip", "f=1"); err != nil {
		return err
	}
	if err := e.refuses(stream, &layerfs.ApplyOptions{Devices: layerfs.DevicesRefuse}); err != nil {
		return fmt.Errorf("refuse: %w", err)
	}
	if onLinux() {
		if _, err := apply("record", layerfs.DevicesRecord); err != nil {
			return err
		}
		if err := e.holds(e.d, "record", "f=1", "null="); err != nil {
			return err
		}
	}
	_, err = apply("make", layerfs.DevicesMake)
	if !e.d.Features().DeviceNodes {
		if err == nil {
			return errors.New("DeviceNodes is false, but one was made")
		}
		return e.usable("make")
	}
	if err != nil {
		return err
	}
	return e.with(e.d, "make", nil, func(path string) error {
		fi, err := os.Lstat(filepath.Join(path, "null"))
		if err != nil || fi.Mode().Type() != os.ModeDevice|os.ModeCharDevice {
			return fmt.Errorf("device: %v, %v", fi, err)
		}
		return nil
	})
}

func testApplyNoSpace(e *env) error {
	const size = 64 << 20
	d, err := e.open(e.h.Small(e.TB, size))
	if err != nil {
		return err
	}
	e.d = d
	if err := e.create("kept", "", "file f 1"); err != nil {
		return err
	}
	if err := e.create("a", ""); err != nil {
		return err
	}
	big := bytes.Repeat([]byte("0123456789abcdef"), 1<<16)
	pr, pw := io.Pipe()
	go func() {
		w := tar.NewWriter(pw)
		var err error
		for i := range 4 * size / len(big) {
			if err = w.WriteHeader(&tar.Header{Name: fmt.Sprintf("f%d", i), Mode: 0o644, Size: int64(len(big)), Uid: os.Geteuid(), Gid: os.Getegid()}); err != nil {
				break
			}
			if _, err = w.Write(big); err != nil {
				break
			}
		}
		pw.CloseWithError(err)
	}()
	_, err = d.Apply(e.ctx, "a", pr, nil)
	pr.Close()
	if err := want(err, "apply", "a", noSpace()); err != nil {
		return err
	}
	if err := e.usable("a"); err != nil {
		return err
	}
	// The disk must not stay full.
	if err := e.create("b", "kept", "data g 1000000 1"); err != nil {
		return err
	}
	return e.with(d, "kept", nil, func(path string) error { return dirHolds(path, "f=1") })
}

// testCreateNoSpace: a copy that does not fit leaves nothing. Where nothing is
// copied, Create succeeds.
func testCreateNoSpace(e *env) error {
	const size = 64 << 20
	d, err := e.open(e.h.Small(e.TB, size))
	if err != nil {
		return err
	}
	e.d = d
	if err := e.create("a", "", fmt.Sprintf("data f %d 1", size*2/3)); err != nil {
		return err
	}
	err = d.Create(e.ctx, "b", "a", nil)
	if err == nil {
		return nil // constant, or with reflinks
	}
	if err := want(err, "create", "b", noSpace()); err != nil {
		return err
	}
	if _, err := d.Stat(e.ctx, "b", nil); !errors.Is(err, layerfs.ErrNotExist) {
		return fmt.Errorf("Stat of a layer whose Create failed: %v", err)
	}
	// It must not have frozen its parent, nor keep the space.
	return e.fill(d, "a", "append f more", fmt.Sprintf("data g %d 2", size/8))
}
