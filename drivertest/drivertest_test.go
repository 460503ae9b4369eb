package drivertest

import (
	"context"
	"errors"
	"io"
	"iter"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/layerfs/layerfs"
	"github.com/layerfs/layerfs/internal/testenv"
	"github.com/layerfs/layerfs/vfs"
)

func TestMain(m *testing.M) {
	Child(good())
	os.Exit(testenv.Main(m))
}

func good() Harness {
	return Harness{Name: "good", New: func(root string) (layerfs.Driver, error) {
		return vfs.New(root, &vfs.Options{Durability: layerfs.DurabilityNone})
	}}
}

func TestCaseNames(t *testing.T) {
	seen := map[string]bool{}
	for _, c := range allCases() {
		assert.False(t, seen[c.name], "two cases named %s", c.name)
		seen[c.name] = true
	}
	assert.False(t, seen[fsSuite])
}

func TestVerdict(t *testing.T) {
	h := Harness{Deviates: map[string]string{"Rename": "by design", "NoSuchCase": "rot"}, Skip: map[string]string{"Modes": "hangs", "NoSuchSkip": "rot"}}
	failure, known := h.verdict("Rename", errors.New("EXDEV"))
	assert.NoError(t, failure)
	assert.Contains(t, known, "by design")
	failure, _ = h.verdict("Rename", nil)
	assert.ErrorContains(t, failure, "passes", "a listed case must fail")
	failure, _ = h.verdict("Files", errors.New("broken"))
	assert.EqualError(t, failure, "broken")
	failure, _ = h.verdict("Files", nil)
	assert.NoError(t, failure)
	assert.Equal(t, []string{"NoSuchCase", "Rename", "NoSuchSkip"}, h.unknown())
}

// TestStamp: with whole seconds no time is finer, whoever set it.
func TestStamp(t *testing.T) {
	for _, whole := range []bool{false, true} {
		e := &env{TB: t, h: Harness{WholeSeconds: whole}}
		dir := t.TempDir()
		set := time.Unix(1e9, 123456789)
		require.NoError(t, makeTree(dir, "file set 1", "file now 2"))
		require.NoError(t, os.Chtimes(filepath.Join(dir, "set"), set, set))
		require.NoError(t, e.stamp(dir, 0))
		for name, want := range map[string]time.Time{"set": set, "now": stampTime("now", 0)} {
			if whole {
				want = want.Truncate(time.Second)
			}
			fi, err := os.Lstat(filepath.Join(dir, name))
			require.NoError(t, err)
			assert.True(t, want.Equal(fi.ModTime()), "%s: %v, want %v", name, fi.ModTime(), want)
		}
	}
}

// broken is a driver with a bug: each field that is set stands in for a method.
type broken struct {
	layerfs.Driver
	create   func(ctx context.Context, id, parent string, opts *layerfs.CreateOptions) error
	get      func(path string) error
	put      func(err error) error
	remove   func(ctx context.Context, id string) error
	diff     func(ctx context.Context, id, base string) (io.ReadCloser, error)
	apply    func(r io.Reader) (layerfs.ApplyResult, error)
	changes  func(layerfs.Change) (layerfs.Change, bool)
	list     func([]layerfs.Info) []layerfs.Info
	features func(layerfs.Features) layerfs.Features
}

func (b *broken) Unwrap() layerfs.Driver { return b.Driver }

func (b *broken) Create(ctx context.Context, id, parent string, opts *layerfs.CreateOptions) error {
	if b.create != nil {
		return b.create(ctx, id, parent, opts)
	}
	return b.Driver.Create(ctx, id, parent, opts)
}

func (b *broken) Get(ctx context.Context, id string, opts *layerfs.GetOptions) (string, error) {
	path, err := b.Driver.Get(ctx, id, opts)
	if err == nil && b.get != nil {
		_ = b.get(path) // fails on a frozen layer
	}
	return path, err
}

func (b *broken) Put(ctx context.Context, id string) error {
	err := b.Driver.Put(ctx, id)
	if b.put != nil {
		err = b.put(err)
	}
	return err
}

func (b *broken) Remove(ctx context.Context, id string) error {
	if b.remove != nil {
		return b.remove(ctx, id)
	}
	return b.Driver.Remove(ctx, id)
}

func (b *broken) Diff(ctx context.Context, id, base string, opts *layerfs.DiffOptions) (io.ReadCloser, error) {
	if b.diff != nil {
		return b.diff(ctx, id, base)
	}
	return b.Driver.Diff(ctx, id, base, opts)
}

func (b *broken) Apply(ctx context.Context, id string, r io.Reader, opts *layerfs.ApplyOptions) (layerfs.ApplyResult, error) {
	if b.apply != nil {
		return b.apply(r)
	}
	return b.Driver.Apply(ctx, id, r, opts)
}

func (b *broken) Changes(ctx context.Context, id, base string) iter.Seq2[layerfs.Change, error] {
	if b.changes == nil {
		return b.Driver.Changes(ctx, id, base)
	}
	return func(yield func(layerfs.Change, error) bool) {
		for c, err := range b.Driver.Changes(ctx, id, base) {
			c, ok := b.changes(c)
			if (ok || err != nil) && !yield(c, err) {
				return
			}
		}
	}
}

func (b *broken) List(ctx context.Context) ([]layerfs.Info, error) {
	infos, err := b.Driver.List(ctx)
	if b.list != nil {
		infos = b.list(infos)
	}
	return infos, err
}

func (b *broken) Features() layerfs.Features {
	f := b.Driver.Features()
	if b.features != nil {
		f = b.features(f)
	}
	return f
}

// TestSuiteCatches breaks a good driver in many ways, and makes sure that the
// case that is there for it fails.
func TestSuiteCatches(t *testing.T) {
	for _, c := range []struct {
		bug     string
		cases   []string
		breakIt func(b *broken)
	}{
		{"deletions are not told", []string{"DeletedFilesInChild", "RemoveAll"}, func(b *broken) {
			b.changes = func(c layerfs.Change) (layerfs.Change, bool) { return c, c.Kind != layerfs.Deleted }
		}},
		{"what is new is told as modified", []string{"Files"}, func(b *broken) {
			b.changes = func(c layerfs.Change) (layerfs.Change, bool) {
				if c.Kind == layerfs.Added {
					c.Kind = layerfs.Modified
				}
				return c, true
			}
		}},
		{"Diff ignores its base", []string{"RemoveAll", "DiffEmpty"}, func(b *broken) {
			b.diff = func(ctx context.Context, id, _ string) (io.ReadCloser, error) { return b.Driver.Diff(ctx, id, "", nil) }
		}},
		{"Diff loses nanoseconds", []string{"NanosecondTimes", "Files"}, func(b *broken) {
			b.diff = func(ctx context.Context, id, base string) (io.ReadCloser, error) {
				return b.Driver.Diff(ctx, id, base, &layerfs.DiffOptions{Profile: layerfs.ProfileOCI})
			}
		}},
		{"Apply does nothing", []string{"ApplyResult", "Files"}, func(b *broken) {
			b.apply = func(r io.Reader) (layerfs.ApplyResult, error) {
				_, err := io.Copy(io.Discard, r)
				return layerfs.ApplyResult{}, err
			}
		}},
		{"layers do not see their parent", []string{"Fork", "AncestorsUntouched", "CreateErrors"}, func(b *broken) {
			b.create = func(ctx context.Context, id, _ string, opts *layerfs.CreateOptions) error {
				return b.Driver.Create(ctx, id, "", opts)
			}
		}},
		{"Get touches the root", []string{"Files", "AncestorsUntouched"}, func(b *broken) {
			b.get = func(path string) error { return os.Chtimes(path, time.Time{}, time.Now()) }
		}},
		{"Get leaves a file", []string{"Empty", "GetPut", "CreateBase"}, func(b *broken) {
			b.get = func(path string) error { return os.WriteFile(filepath.Join(path, "left"), nil, 0o600) }
		}},
		{"Put never fails", []string{"GetPut", "TwoDrivers"}, func(b *broken) {
			b.put = func(error) error { return nil }
		}},
		{"errors are bare", []string{"Name", "RemoveErrors"}, func(b *broken) {
			b.remove = func(ctx context.Context, id string) error {
				err := b.Driver.Remove(ctx, id)
				for _, s := range []error{layerfs.ErrNotExist, layerfs.ErrInUse} {
					if errors.Is(err, s) {
						return s
					}
				}
				return err
			}
		}},
		{"the list is in another order", []string{"StatList"}, func(b *broken) {
			b.list = func(l []layerfs.Info) []layerfs.Info {
				l = slices.Clone(l)
				slices.SortFunc(l, func(x, y layerfs.Info) int { return layerfs.ComparePaths(x.ID, y.ID) })
				return l
			}
		}},
		{"the depth is limited, but nothing limits it", []string{"FeatureMaxDepth"}, func(b *broken) {
			b.features = func(f layerfs.Features) layerfs.Features { f.MaxDepth = 3; return f }
		}},
		{"what works is denied", []string{"FeatureRename"}, func(b *broken) {
			b.features = func(f layerfs.Features) layerfs.Features { f.Rename = false; return f }
		}},
		{"a reason for what works", []string{"FeatureReasons"}, func(b *broken) {
			b.features = func(f layerfs.Features) layerfs.Features {
				f.Reasons = map[string]string{"Rename": "none"}
				return f
			}
		}},
	} {
		t.Run(c.bug, func(t *testing.T) {
			h := good()
			inner := h.New
			h.New = func(root string) (layerfs.Driver, error) {
				d, err := inner(root)
				if err != nil {
					return nil, err
				}
				b := &broken{Driver: d}
				c.breakIt(b)
				return b, nil
			}
			for _, name := range c.cases {
				i := slices.IndexFunc(allCases(), func(tc testCase) bool { return tc.name == name })
				require.GreaterOrEqual(t, i, 0, name)
				e := newEnv(t, h)
				err := allCases()[i].run(e)
				_ = e.finish() // which may fail for the same bug
				require.Error(t, err, "%s does not see it", name)
				require.NotErrorAs(t, err, new(*skipError), name)
			}
		})
	}
}

// TestGood makes sure that it is the bugs that are caught.
func TestGood(t *testing.T) {
	if testing.Short() {
		t.Skip("the tests of vfs do the same")
	}
	for _, c := range allCases() {
		if !slices.Contains([]string{"DeletedFilesInChild", "RemoveAll", "Files", "DiffEmpty", "NanosecondTimes", "ApplyResult", "Fork", "CreateErrors", "DiffStable", "Empty", "GetPut", "Name", "StatList", "FeatureMaxDepth", "FeatureRename", "FeatureReasons", "TwoProcesses"}, c.name) {
			continue
		}
		t.Run(c.name, func(t *testing.T) { good().runCase(t, c) })
	}
}

func TestCross(t *testing.T) {
	other := good()
	other.Name = "other"
	Cross(t, good(), other)
}
