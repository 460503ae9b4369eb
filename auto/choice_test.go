package auto

import (
	"bytes"
	"context"
	"errors"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"reflect"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/layerfs/layerfs"
)

// fake is a driver that can do nothing but say who it is.
type fake struct {
	layerfs.Driver
	name     string
	features layerfs.Features
}

func (f fake) Name() string               { return f.name }
func (f fake) Features() layerfs.Features { return f.features }
func (f fake) Close() error               { return nil }

// fakes makes backends that open with the error of their name, if any. Like
// real ones they make their home before they find out what works.
func fakes(errs map[string]error, names ...string) []backend {
	var all []backend
	for _, name := range names {
		all = append(all, backend{
			name:     name,
			liveBase: name == "aufs",
			open: func(root string, _ *Options) (layerfs.Driver, error) {
				if err := os.MkdirAll(filepath.Join(root, name), 0o755); err != nil {
					return nil, err
				}
				if err := errs[name]; err != nil {
					return nil, &layerfs.Error{Op: "open", Driver: name, Path: root, Err: err}
				}
				return fake{name: name}, nil
			},
		})
	}
	return all
}

// record makes what a driver's layer leaves in a root.
func record(t *testing.T, root, driver, file string) {
	t.Helper()
	dir := filepath.Join(root, driver, ".layerfs", "records")
	require.NoError(t, os.MkdirAll(dir, 0o755))
	if file != "" {
		require.NoError(t, os.WriteFile(filepath.Join(dir, file), []byte("{}"), 0o644))
	}
}

func TestChoice(t *testing.T) {
	unsupported := &layerfs.UnsupportedError{Feature: "it", Reason: "no module"}
	defaults := []string{"overlay", "btrfs", "aufs", "vfs"}
	for _, tc := range []struct {
		name   string
		opts   *Options
		prior  []string
		errs   map[string]error
		want   string   // driver
		is     error    // what the error matches
		says   []string // what the error says
		absent []string // homes that must not be there afterwards
	}{
		{name: "first", want: "overlay"},
		{name: "skips-unsupported", errs: map[string]error{"overlay": unsupported, "btrfs": unsupported}, want: "aufs", absent: []string{"overlay", "btrfs"}},
		{name: "stops-at-other-errors", errs: map[string]error{"overlay": fs.ErrPermission}, is: fs.ErrPermission, says: []string{"overlay: open"}},
		{
			name: "none", errs: map[string]error{"overlay": unsupported, "btrfs": unsupported, "aufs": unsupported, "vfs": unsupported},
			is: errors.ErrUnsupported, says: []string{"no driver works here", "overlay: ", "btrfs: ", "aufs: ", "vfs: ", "no module"},
			absent: defaults,
		},
		{name: "live-base", opts: &Options{LiveBase: true}, want: "aufs"},
		{name: "live-base-falls-back", opts: &Options{LiveBase: true}, errs: map[string]error{"aufs": unsupported}, want: "overlay"},
		{name: "priority", opts: &Options{Priority: []string{"vfs", "overlay"}}, want: "vfs"},
		{name: "priority-beats-live-base", opts: &Options{Priority: []string{"btrfs"}, LiveBase: true}, want: "btrfs"},
		{name: "priority-excludes", opts: &Options{Priority: []string{"btrfs"}}, errs: map[string]error{"btrfs": unsupported}, is: errors.ErrUnsupported, absent: []string{"overlay", "vfs"}},
		{name: "priority-unknown", opts: &Options{Priority: []string{"overlay", "overlay3"}}, says: []string{"priority", `"overlay3"`, "overlay, btrfs, aufs, vfs"}},
		{name: "named", opts: &Options{Driver: "vfs"}, want: "vfs", absent: []string{"overlay"}},
		{name: "named-unknown", opts: &Options{Driver: "zip"}, says: []string{`"zip"`, "overlay, btrfs, aufs, vfs"}},
		{name: "named-unsupported", opts: &Options{Driver: "btrfs"}, errs: map[string]error{"btrfs": unsupported}, is: errors.ErrUnsupported, says: []string{"btrfs: open"}},
		{name: "named-beats-prior", opts: &Options{Driver: "vfs"}, prior: []string{"overlay", "btrfs"}, want: "vfs"},
		{name: "prior", prior: []string{"vfs"}, want: "vfs", absent: []string{"overlay"}},
		{name: "prior-beats-priority", opts: &Options{Priority: []string{"overlay"}}, prior: []string{"btrfs"}, want: "btrfs"},
		{name: "prior-beats-live-base", opts: &Options{LiveBase: true}, prior: []string{"overlay"}, want: "overlay"},
		{
			name: "prior-unsupported", prior: []string{"btrfs"}, errs: map[string]error{"btrfs": unsupported},
			is: errors.ErrUnsupported, says: []string{"layers in it are of btrfs", "no module"}, absent: []string{"overlay"},
		},
		{name: "prior-broken", prior: []string{"btrfs"}, errs: map[string]error{"btrfs": fs.ErrPermission}, is: fs.ErrPermission},
		{name: "prior-several", prior: []string{"vfs", "btrfs"}, says: []string{"several drivers (btrfs, vfs)", "name"}, absent: []string{"overlay"}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			root := t.TempDir()
			for _, p := range tc.prior {
				record(t, root, p, "layer")
			}
			d, err := choose(fakes(tc.errs, defaults...), root, tc.opts)
			if tc.want != "" {
				require.NoError(t, err)
				assert.Equal(t, tc.want, d.Name())
			} else {
				require.Error(t, err)
				assert.Nil(t, d)
				_, ok := errors.AsType[*layerfs.Error](err)
				assert.True(t, ok, "%v is no *layerfs.Error", err)
			}
			if tc.is != nil {
				assert.ErrorIs(t, err, tc.is)
			} else if err != nil {
				assert.NotErrorIs(t, err, errors.ErrUnsupported)
			}
			for _, s := range tc.says {
				assert.ErrorContains(t, err, s)
			}
			for _, name := range tc.absent {
				assert.NoDirExists(t, filepath.Join(root, name))
			}
		})
	}
}

// What is not a layer's record does not make a driver's data.
func TestChoice_priorNeedsRecord(t *testing.T) {
	root := t.TempDir()
	record(t, root, "vfs", "")
	record(t, root, "btrfs", ".tmp-1")
	d, err := choose(fakes(nil, "overlay", "btrfs", "vfs"), root, nil)
	require.NoError(t, err)
	assert.Equal(t, "overlay", d.Name())
}

// A home that was there is not removed when its driver is passed over.
func TestChoice_keepsHomes(t *testing.T) {
	root := t.TempDir()
	require.NoError(t, os.Mkdir(filepath.Join(root, "overlay"), 0o755))
	unsupported := map[string]error{"overlay": errors.ErrUnsupported}
	d, err := choose(fakes(unsupported, "overlay", "vfs"), root, nil)
	require.NoError(t, err)
	assert.Equal(t, "vfs", d.Name())
	assert.DirExists(t, filepath.Join(root, "overlay"))
}

// A backend may keep its layers under another name, by which it is known, too.
func TestChoice_otherDirectory(t *testing.T) {
	all := fakes(nil, "overlay", "devmapper")
	all[1].dir = "devicemapper"
	root := t.TempDir()
	record(t, root, "devicemapper", "layer")
	d, err := choose(all, root, nil)
	require.NoError(t, err)
	assert.Equal(t, "devmapper", d.Name())
	for _, name := range []string{"devmapper", "devicemapper"} {
		d, err := choose(all, t.TempDir(), &Options{Driver: name})
		require.NoError(t, err)
		assert.Equal(t, "devmapper", d.Name())
	}
	_, err = choose(all, root, &Options{Priority: []string{""}})
	assert.ErrorContains(t, err, `""`)
}

func TestChoice_unreadableRoot(t *testing.T) {
	root := filepath.Join(t.TempDir(), "file")
	require.NoError(t, os.WriteFile(root, nil, 0o644))
	_, err := choose(fakes(nil, "overlay", "vfs"), root, nil)
	require.Error(t, err)
	assert.ErrorContains(t, err, "file")
}

func TestChoice_logsWhyNot(t *testing.T) {
	var log bytes.Buffer
	opts := &Options{Logger: slog.New(slog.NewTextHandler(&log, nil))}
	_, err := choose(fakes(map[string]error{"overlay": errors.ErrUnsupported}, "overlay", "vfs"), t.TempDir(), opts)
	require.NoError(t, err)
	assert.Contains(t, log.String(), "driver=overlay")
	assert.NotContains(t, log.String(), "driver=vfs")
}

func TestAbilities(t *testing.T) {
	// Every ability that the contract knows is in the table, under its name.
	typ := reflect.TypeFor[layerfs.Features]()
	var fields []string
	for f := range typ.Fields() {
		if f.Type.Kind() == reflect.Bool {
			fields = append(fields, f.Name)
		}
	}
	for _, name := range fields {
		var r Report
		reflect.ValueOf(&r.Features).Elem().FieldByName(name).SetBool(true)
		var got, have []string
		for _, a := range r.Abilities() {
			got = append(got, a.Name)
			if a.Have {
				have = append(have, a.Name)
				assert.Empty(t, a.Reason)
			} else {
				assert.NotEmpty(t, a.Reason, a.Name)
			}
		}
		assert.Equal(t, fields, got)
		assert.Equal(t, []string{name}, have)
	}
}

func TestAbilities_reasons(t *testing.T) {
	r := Report{
		Driver:   "vfs",
		Features: layerfs.Features{Reasons: map[string]string{"Quota": "asked"}},
		never:    map[string]string{"Quota": "known", "LiveBase": "known"},
	}
	got := map[string]string{}
	for _, a := range r.Abilities() {
		got[a.Name] = a.Reason
	}
	assert.Equal(t, "asked", got["Quota"], "the driver knows better")
	assert.Equal(t, "known", got["LiveBase"])
	assert.Contains(t, got["IDMap"], "vfs")
	r.Err = errors.New("broken")
	for _, a := range r.Abilities() {
		assert.Equal(t, "broken", a.Reason)
		assert.False(t, a.Have)
	}
}

func TestProbe_fakes(t *testing.T) {
	all := fakes(map[string]error{"overlay": fs.ErrPermission}, "overlay", "vfs")
	t.Run("all-are-asked", func(t *testing.T) {
		root := t.TempDir()
		reports, err := probe(t.Context(), all, root)
		require.NoError(t, err)
		require.Len(t, reports, 2)
		assert.ErrorIs(t, reports[0].Err, fs.ErrPermission)
		assert.NoError(t, reports[1].Err)
		entries, err := os.ReadDir(root)
		require.NoError(t, err)
		assert.Empty(t, entries)
	})
	t.Run("options-for-a-trial", func(t *testing.T) {
		list := fakes(nil, "overlay", "vfs")
		var got []*Options
		for i := range list {
			open := list[i].open
			list[i].open = func(root string, o *Options) (layerfs.Driver, error) {
				got = append(got, o)
				return open(root, o)
			}
		}
		list[0].probe = &Options{Durability: layerfs.DurabilityNone}
		_, err := probe(t.Context(), list, t.TempDir())
		require.NoError(t, err)
		assert.Equal(t, []*Options{{Durability: layerfs.DurabilityNone}, {}}, got)
	})
	t.Run("root-missing", func(t *testing.T) {
		parent := t.TempDir()
		_, err := probe(t.Context(), all, filepath.Join(parent, "a", "b"))
		require.NoError(t, err)
		entries, err := os.ReadDir(parent)
		require.NoError(t, err)
		assert.Empty(t, entries)
	})
	t.Run("root-is-file", func(t *testing.T) {
		file := filepath.Join(t.TempDir(), "file")
		require.NoError(t, os.WriteFile(file, nil, 0o644))
		_, err := probe(t.Context(), all, file)
		assert.ErrorContains(t, err, "is no directory")
	})
	t.Run("cancelled", func(t *testing.T) {
		root := t.TempDir()
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		_, err := probe(ctx, all, root)
		assert.ErrorIs(t, err, context.Canceled)
		entries, err := os.ReadDir(root)
		require.NoError(t, err)
		assert.Empty(t, entries)
	})
}
