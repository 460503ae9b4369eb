package drivertest

import (
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"syscall"
	"time"

	"github.com/layerfs/layerfs"
)

// featureCases test each fact of Features both ways: that what it says works
// does, and that what it says does not, does not.
func featureCases() []testCase {
	return append([]testCase{
		{name: "FeatureReasons", run: testFeatureReasons},
		{name: "FeatureMaxDepth", run: testMaxDepth},
		{name: "FeatureReadOnlyViews", run: testReadOnlyViews},
		{name: "FeatureRename", run: testFeatureRename},
		{name: "FeatureLiveBase", run: testLiveBase},
		{name: "FeatureConstantCreate", needs: needIdle, run: testConstantCreate},
		{name: "FeatureNativeChanges", needs: needIdle, run: testNativeChanges},
		{name: "FeatureNativeDiff", needs: needIdle, run: testNativeDiff},
		{name: "FeatureQuota", run: testFeatureQuota},
		{name: "FeatureInodeQuota", run: testFeatureInodeQuota},
		{name: "FeatureIDMap", run: testFeatureIDMap},
	}, linuxFeatureCases()...)
}

func testFeatureReasons(e *env) error {
	f := e.d.Features()
	v := reflect.ValueOf(f)
	for _, name := range slices.Sorted(maps.Keys(f.Reasons)) {
		field := v.FieldByName(name)
		if !field.IsValid() || field.Kind() != reflect.Bool {
			return fmt.Errorf("Reasons has %q, which is no ability", name)
		}
		if field.Bool() || f.Reasons[name] == "" {
			return fmt.Errorf("%s = %v, for the reason %q", name, field.Bool(), f.Reasons[name])
		}
	}
	if f.MaxDepth < 0 {
		return fmt.Errorf("MaxDepth = %d", f.MaxDepth)
	}
	if again := e.d.Features(); !reflect.DeepEqual(f, again) {
		return fmt.Errorf("Features = %+v, then %+v", f, again)
	}
	return nil
}

func testMaxDepth(e *env) error {
	most := e.d.Features().MaxDepth
	if most == 0 {
		return nil // DeepStack makes many
	}
	const patience = 600
	if most > patience {
		return skipf("%d layers take too long", most)
	}
	parent := ""
	for i := range most {
		id := fmt.Sprintf("l%d", i)
		if err := e.d.Create(e.ctx, id, parent, nil); err != nil {
			return err
		}
		if i == 0 || i == most-1 {
			if err := e.fill(e.d, id, "file f "+id); err != nil {
				return err
			}
		}
		parent = id
	}
	if err := e.holds(e.d, parent, "f="+parent); err != nil {
		return err
	}
	err := e.d.Create(e.ctx, "more", parent, nil)
	return want(err, "create", "more", errors.ErrUnsupported)
}

func testReadOnlyViews(e *env) error {
	if e.d.Features().LiveBase {
		return skipf("the driver has live bases")
	}
	if err := errors.Join(e.create("a", "", "file f 1"), e.create("b", "a")); err != nil {
		return err
	}
	if err := e.readOnly("a"); err != nil {
		return err
	}
	_, err := e.d.Get(e.ctx, "b", readOnly)
	if e.d.Features().ReadOnlyViews {
		return err
	}
	return want(err, "get", "b", errors.ErrUnsupported)
}

func testFeatureRename(e *env) error {
	if err := errors.Join(e.create("a", "", "file d/f 1"), e.create("b", "a")); err != nil {
		return err
	}
	return e.with(e.d, "b", nil, func(path string) error {
		err := os.Rename(filepath.Join(path, "d"), filepath.Join(path, "e"))
		if e.d.Features().Rename {
			if err != nil {
				return err
			}
			return dirHolds(filepath.Join(path, "e"), "f=1")
		}
		if !errors.Is(err, syscall.EXDEV) {
			return fmt.Errorf("Rename is false, but rename gives %v, not EXDEV", err)
		}
		return nil
	})
}

func testLiveBase(e *env) error {
	if err := errors.Join(e.create("a", "", "file f old"), e.create("b", "a")); err != nil {
		return err
	}
	child, err := e.d.Get(e.ctx, "b", nil)
	if err != nil {
		return err
	}
	base, err := e.d.Get(e.ctx, "a", nil)
	if err != nil {
		return err
	}
	write := func() error {
		return errors.Join(os.WriteFile(filepath.Join(base, "f"), []byte("new"), 0o600), os.WriteFile(filepath.Join(base, "g"), []byte("2"), 0o600))
	}
	if e.d.Features().LiveBase {
		if err := write(); err != nil {
			return err
		}
		return dirHolds(child, "f=new", "g=2")
	}
	if e.d.Features().ReadOnlyViews {
		if err := write(); err == nil {
			return errors.New("the base could be written")
		}
		return dirHolds(child, "f=old")
	}
	// Nothing keeps the caller from writing to what is frozen; where every
	// layer is a copy of its own that does not show.
	return nil
}

// fastest returns the shortest of some runs.
func fastest(runs int, fn func(i int) error) (time.Duration, error) {
	best := time.Hour
	for i := range runs {
		start := time.Now()
		if err := fn(i); err != nil {
			return 0, err
		}
		best = min(best, time.Since(start))
	}
	return best, nil
}

// scales tells whether something costs more on a tree of many files than on
// one of few. The trees differ by a factor of a thousand, the answer is drawn
// at one of four, so that neither a busy machine nor fixed costs confuse it.
func (e *env) scales(claim string, constant bool, fn func(id string, i int) error) error {
	const files = 3000
	var steps []string
	for i := range files {
		steps = append(steps, fmt.Sprintf("file d%02d/f%04d %d", i%40, i, i))
	}
	if err := errors.Join(e.create("small", "", steps[:4]...), e.create("large", "", steps...)); err != nil {
		return err
	}
	var times []time.Duration
	for _, id := range []string{"small", "large"} {
		t, err := fastest(4, func(i int) error { return fn(id, i) })
		if err != nil {
			return err
		}
		times = append(times, t)
	}
	grows := times[1] > 4*times[0]+2*time.Millisecond
	if grows == constant {
		return fmt.Errorf("%s = %v, but it takes %v with 4 files and %v with %d", claim, constant, times[0], times[1], files)
	}
	return nil
}

func testConstantCreate(e *env) error {
	return e.scales("ConstantCreate", e.d.Features().ConstantCreate, func(id string, i int) error {
		return e.d.Create(e.ctx, fmt.Sprintf("on-%s-%d", id, i), id, nil)
	})
}

// child makes a layer with one change for the cases about native paths.
func (e *env) oneChange(parent string) (string, error) {
	id := "changed-" + parent
	if _, err := e.d.Stat(e.ctx, id, nil); err == nil {
		return id, nil
	}
	return id, e.create(id, parent, "file new 1")
}

func testNativeChanges(e *env) error {
	return e.scales("NativeChanges", e.d.Features().NativeChanges, func(parent string, _ int) error {
		id, err := e.oneChange(parent)
		if err != nil {
			return err
		}
		list, err := collect(e.d, e, id, parent)
		if err == nil && len(list) != 2 {
			err = fmt.Errorf("changes %v, want / and /new", list)
		}
		return err
	})
}

func testNativeDiff(e *env) error {
	return e.scales("NativeDiff", e.d.Features().NativeDiff, func(parent string, _ int) error {
		id, err := e.oneChange(parent)
		if err != nil {
			return err
		}
		_, err = readDiff(e, e.d, id, parent, nil)
		return err
	})
}

// quota runs fn on a layer with a quota, in the ways to set one, if the driver
// can; else it makes sure that all of them are refused.
func (e *env) quota(ability bool, q layerfs.Quota, fn func(id string) error) error {
	if err := e.create("base", "", "file f 1"); err != nil {
		return err
	}
	opts := &layerfs.CreateOptions{Quota: q}
	err := e.d.Create(e.ctx, "created", "base", opts)
	if !ability {
		if err := want(err, "create", "created", errors.ErrUnsupported); err != nil {
			return err
		}
		if _, err := e.d.Stat(e.ctx, "created", nil); !errors.Is(err, layerfs.ErrNotExist) {
			return fmt.Errorf("a refused Create left a layer: %v", err)
		}
		if err := e.create("plain", "base"); err != nil {
			return err
		}
		return want(layerfs.SetQuota(e.ctx, e.d, "plain", q), "set quota", "plain", errors.ErrUnsupported)
	}
	if err != nil {
		return err
	}
	if info, err := e.d.Stat(e.ctx, "created", nil); err != nil || info.Quota != q {
		return fmt.Errorf("Stat = %+v, %v; want quota %+v", info, err, q)
	}
	if err := fn("created"); err != nil {
		return fmt.Errorf("quota of Create: %w", err)
	}
	if err := e.create("later", "base"); err != nil {
		return err
	}
	if err := layerfs.SetQuota(e.ctx, e.d, "later", q); err != nil {
		return err
	}
	if err := fn("later"); err != nil {
		return fmt.Errorf("quota of SetQuota: %w", err)
	}
	// Lifted, the layer takes what it refused before.
	if err := layerfs.SetQuota(e.ctx, e.d, "later", layerfs.Quota{}); err != nil {
		return err
	}
	if err := fn("later"); !errors.Is(err, errUnlimited) {
		return fmt.Errorf("a quota that was lifted still limits: %w", err)
	}
	// And it is a limit of that layer alone.
	if err := e.create("free", "base"); err != nil {
		return err
	}
	if err := fn("free"); !errors.Is(err, errUnlimited) {
		return fmt.Errorf("a layer without a quota is limited: %w", err)
	}
	return nil
}

// limitedIn runs fn on a layer as a container would.
func (e *env) limitedIn(id string, fn func(path string) error) error {
	return e.with(e.d, id, nil, func(path string) error {
		return limited(func() error { return fn(path) })
	})
}

// errUnlimited says that nothing limited a layer.
var errUnlimited = errors.New("nothing was refused")

func isFull(err error) bool {
	return errors.Is(err, syscall.ENOSPC) || errors.Is(err, errQuota)
}

func testFeatureQuota(e *env) error {
	const limit = 8 << 20
	return e.quota(e.d.Features().Quota, layerfs.Quota{Bytes: limit}, func(id string) error {
		return e.limitedIn(id, func(path string) error {
			f, err := os.Create(filepath.Join(path, "big"))
			if err != nil {
				return err
			}
			defer f.Close()
			chunk := make([]byte, 1<<20)
			for i := range chunk {
				chunk[i] = byte(i*7 + i>>8)
			}
			for n := range 24 {
				_, err := f.Write(chunk)
				if err == nil {
					err = f.Sync() // some file systems allocate late
				}
				if isFull(err) {
					if n < 4 {
						return fmt.Errorf("a quota of 8 MiB was reached after %d", n)
					}
					return nil
				}
				if err != nil {
					return err
				}
			}
			return errUnlimited
		})
	})
}

func testFeatureInodeQuota(e *env) error {
	return e.quota(e.d.Features().InodeQuota, layerfs.Quota{Inodes: 50}, func(id string) error {
		return e.limitedIn(id, func(path string) error {
			for n := range 100 {
				err := os.WriteFile(filepath.Join(path, fmt.Sprintf("f%d", n)), nil, 0o600)
				if isFull(err) {
					if n < 20 {
						return fmt.Errorf("a quota of 50 inodes was reached after %d", n)
					}
					return nil
				}
				if err != nil {
					return err
				}
			}
			return errUnlimited
		})
	})
}

func testFeatureIDMap(e *env) error {
	if err := e.create("a", "", "file f 1", "file g 2"); err != nil {
		return err
	}
	mapped := &layerfs.GetOptions{IDMap: someMap}
	path, err := e.d.Get(e.ctx, "a", mapped)
	if !e.d.Features().IDMap {
		return want(err, "get", "a", errors.ErrUnsupported)
	}
	if err != nil {
		return err
	}
	if err := wantOwners(path, map[string][2]uint32{".": {100000, 200000}, "f": {100000, 200000}}); err != nil {
		return err
	}
	// This process has an owner that is not in the map, so it can change files
	// but not make any.
	if err := makeTree(path, "chown g 100005:200006"); err != nil {
		return err
	}
	_, err = e.d.Get(e.ctx, "a", nil)
	if err := want(err, "get", "a", layerfs.ErrInUse); err != nil {
		return err
	}
	if again, err := e.d.Get(e.ctx, "a", mapped); err != nil || again != path {
		return fmt.Errorf("second Get = %q, %v", again, err)
	}
	if err := errors.Join(e.d.Put(e.ctx, "a"), e.d.Put(e.ctx, "a")); err != nil {
		return err
	}
	err = e.with(e.d, "a", nil, func(path string) error {
		return wantOwners(path, map[string][2]uint32{"f": {0, 0}, "g": {5, 6}})
	})
	if err != nil {
		return fmt.Errorf("after the mapped Get: %w", err)
	}
	// A frozen layer is mapped, too, and stays read-only.
	if err := e.create("b", "a"); err != nil {
		return err
	}
	return e.with(e.d, "a", mapped, func(path string) error {
		if e.d.Features().ReadOnlyViews && !e.d.Features().LiveBase && os.WriteFile(filepath.Join(path, "h"), nil, 0o600) == nil {
			return errors.New("a frozen layer could be written through a mapped Get")
		}
		return wantOwners(path, map[string][2]uint32{"f": {100000, 200000}, "g": {100005, 200006}})
	})
}
