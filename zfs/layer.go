//go:build linux || freebsd

package zfs

import (
	"bufio"
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/layerfs/layerfs"
	"github.com/layerfs/layerfs/archive"
	"github.com/layerfs/layerfs/internal/lifecycle"
	"github.com/layerfs/layerfs/internal/undo"
)

// backend is what a record keeps for this package.
type backend struct {
	// Snapshot is the name, after the @, of the parent's snapshot that the
	// layer was cloned from by Create. While the layer is there the parent is
	// frozen, so that other children can be cloned from it too.
	Snapshot string `json:"snapshot,omitempty"`
}

func backendOf(rec *lifecycle.Record) backend {
	var b backend
	_ = json.Unmarshal(rec.Backend, &b) // none is none
	return b
}

// Create makes the dataset of a layer.
//
// The first child of a parent takes three calls: snapshot, clone, and a
// deferred destroy, so that the snapshot goes with the last clone. Others are
// cloned from the same snapshot with one.
func (m *mechanism) Create(ctx context.Context, rec *lifecycle.Record, _ lifecycle.Chain, _ *layerfs.CreateOptions) error {
	if rec.Quota == (layerfs.Quota{}) {
		rec.Quota = m.opts.Quota
	}
	return m.make(ctx, rec)
}

func (m *mechanism) make(ctx context.Context, rec *lifecycle.Record) error {
	if rec.Parent == "" {
		return m.build(ctx, rec, func(props []string) error {
			return m.whileFreeing(ctx, func() error {
				_, err := m.tool.run(ctx, slices.Concat([]string{"create"}, props, []string{m.dataset(rec.ID)})...)
				return err
			})
		})
	}
	return m.build(ctx, rec, func(props []string) error {
		return m.whileFreeing(ctx, func() error { return m.cloneParent(ctx, rec, props) })
	})
}

// whileFreeing tries something again that found the pool full while the space
// of what was destroyed comes back: that goes on in the background
// (async_destroy, zpool-features(7)), and the last of it takes some
// transaction groups more than the pool's property says.
func (m *mechanism) whileFreeing(ctx context.Context, call func() error) error {
	const least, most = 3 * time.Second, 30 * time.Second
	for start := time.Now(); ; {
		err := call()
		if !says(err, textNoSpace) {
			return err
		}
		if gone := time.Since(start); gone > most || gone > least && !m.freeing(ctx) {
			return fmt.Errorf("%w: %w", syscall.ENOSPC, err)
		}
		t := time.NewTimer(200 * time.Millisecond)
		select {
		case <-t.C:
		case <-ctx.Done():
			t.Stop()
			return context.Cause(ctx)
		}
	}
}

// freeing reports whether the pool still gives space back.
func (m *mechanism) freeing(ctx context.Context) bool {
	var out strings.Builder
	err := m.tool.pipe(ctx, nil, &out, m.tool.zpool, "get", "-H", "-p", "-o", "value", "freeing", m.tool.pool)
	n, perr := strconv.ParseInt(strings.TrimSpace(out.String()), 10, 64)
	return err == nil && perr == nil && n > 0
}

// build makes the dataset of a layer by a function, and the directory it is
// shown at.
func (m *mechanism) build(ctx context.Context, rec *lifecycle.Record, dataset func(props []string) error) (err error) {
	if rec.Quota.Inodes != 0 {
		return inodeQuota()
	}
	if rec.MountLabel != "" {
		if err := m.labels(); err != nil {
			return err
		}
	}
	ds := m.dataset(rec.ID)
	if len(ds) > maxName {
		return fmt.Errorf("dataset name %s has %d bytes, more than %d", ds, len(ds), maxName)
	}
	var u undo.Stack
	defer u.Run(&err)
	path := m.Path(rec.ID)
	switch err := os.Mkdir(path, 0o700); {
	case errors.Is(err, fs.ErrExist) && backendOf(rec).Snapshot == "":
		// A creation crashed, or its call was left behind.
		if err := m.dropSnapshots(ctx, rec.ID); err != nil {
			return err
		}
	case err != nil && !errors.Is(err, fs.ErrExist):
		return err
	}
	u.Push(func() error {
		if errors.Is(err, errLeft) {
			return nil // New sees by it that there may be something to undo
		}
		return removeDir(path)
	})
	props := m.properties(rec)
	err = dataset(props)
	if says(err, textExists) {
		// A crash may have left it, or an administrator made it.
		if derr := m.destroy(ctx, rec.ID); derr != nil {
			return derr
		}
		err = dataset(props)
	}
	if err != nil && context.Cause(ctx) != nil {
		// The program may have been killed after the dataset was made.
		u.Push(func() error { return m.destroy(context.WithoutCancel(ctx), rec.ID) })
	}
	return err
}

// properties are the arguments that set the properties of a new layer. What is
// inherited from the parent dataset must not spoil a layer.
func (m *mechanism) properties(rec *lifecycle.Record) []string {
	props := map[string]string{
		"canmount":   "noauto",
		"mountpoint": "legacy",
		"readonly":   "off",
		"snapdir":    "hidden",
		propLayer:    markOf(m.root, rec.ID),
	}
	maps.Copy(props, m.facts.Properties)
	maps.Copy(props, m.opts.Properties)
	if rec.Quota.Bytes > 0 {
		props["quota"] = strconv.FormatInt(rec.Quota.Bytes, 10)
	}
	if m.opts.RefQuota > 0 {
		props["refquota"] = strconv.FormatInt(m.opts.RefQuota, 10)
	}
	var args []string
	for _, p := range slices.Sorted(maps.Keys(props)) {
		args = append(args, "-o", p+"="+props[p])
	}
	return args
}

// cloneParent clones a layer's dataset from its parent, which is frozen.
//
// A layer that is made anew by Rollback gets a snapshot of the name it had, as
// its record stays.
func (m *mechanism) cloneParent(ctx context.Context, rec *lifecycle.Record, props []string) error {
	had := backendOf(rec).Snapshot
	if snap := cmp.Or(had, m.sibling(rec)); snap != "" {
		_, err := m.tool.run(ctx, slices.Concat([]string{"clone"}, props, []string{m.dataset(rec.Parent) + "@" + snap, m.dataset(rec.ID)})...)
		if err == nil && had != "" {
			// A crash of an earlier Rollback may have left it as it was taken.
			err = m.dropSnapshot(ctx, m.dataset(rec.Parent)+"@"+snap)
		}
		if err == nil {
			return keep(rec, snap)
		}
		if !says(err, textMissing, textNoParent) {
			return err
		}
		// The sibling and its snapshot went since.
	}
	full, err := newSnapshot(m.dataset(rec.Parent), rec.ID)
	if err != nil {
		return err
	}
	if had != "" {
		full = m.dataset(rec.Parent) + "@" + had
	}
	if err := m.cloneOf(ctx, rec, full, props); err != nil {
		return err
	}
	_, snap, _ := splitSnapshot(full)
	return keep(rec, snap)
}

func keep(rec *lifecycle.Record, snap string) (err error) {
	rec.Backend, err = json.Marshal(backend{Snapshot: snap})
	return err
}

// sibling returns the snapshot of the parent that another child was cloned
// from. That child was there since the snapshot, so the parent has not been
// written since.
func (m *mechanism) sibling(rec *lifecycle.Record) string {
	children, err := m.dir.Noted(rec.Parent)
	if err != nil {
		return ""
	}
	// The newest are the likeliest to be there; nearly all have a snapshot.
	const most, records = 64, 8 // names and records that are looked at
	found := 0
	for _, c := range slices.Backward(children[max(0, len(children)-most):]) {
		if c == rec.ID {
			continue
		}
		s, err := m.dir.Load(c)
		if err != nil || s.Parent != rec.Parent {
			continue
		}
		if found++; found > records {
			break
		}
		if b := backendOf(s); strings.HasPrefix(b.Snapshot, snapshotPrefix) {
			return b.Snapshot
		}
	}
	return ""
}

// cloneOf takes a snapshot, makes a layer of it and leaves the snapshot to the
// clone.
func (m *mechanism) cloneOf(ctx context.Context, rec *lifecycle.Record, full string, props []string) (err error) {
	var u undo.Stack
	defer u.Run(&err)
	u.Push(func() error { return m.dropSnapshot(context.WithoutCancel(ctx), full) }) // before: a killed zfs may have taken it
	if _, err := m.tool.run(ctx, "snapshot", full); err != nil {
		return err
	}
	if _, err := m.tool.run(ctx, slices.Concat([]string{"clone"}, props, []string{full, m.dataset(rec.ID)})...); err != nil {
		return err
	}
	u.Push(func() error { return m.destroy(context.WithoutCancel(ctx), rec.ID) })
	_, err = m.tool.run(ctx, "destroy", "-d", full)
	return err
}

// Delete removes the dataset of a layer, and what a crash of its creation left
// elsewhere.
func (m *mechanism) Delete(ctx context.Context, rec *lifecycle.Record) error {
	if err := m.destroy(ctx, rec.ID); err != nil {
		return err
	}
	for _, dir := range []string{m.Path(rec.ID), m.stage(rec.ID), m.state("received", rec.ID)} {
		if err := removeDir(dir); err != nil {
			return err
		}
	}
	if b := backendOf(rec); rec.Incomplete != "" && b.Snapshot != "" {
		// A Rollback may have ended between the snapshot and the clone.
		if err := m.dropSnapshot(ctx, m.dataset(rec.Parent)+"@"+b.Snapshot); err != nil {
			return err
		}
	}
	if !rec.Created.IsZero() {
		return nil
	}
	if err := os.RemoveAll(m.dir.BuildPath(rec.ID)); err != nil {
		return err
	}
	return m.dropSnapshots(ctx, rec.ID)
}

// removeDir removes a file or an empty directory; its absence is fine.
func removeDir(path string) error {
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

// dropSnapshots destroys the snapshots that were taken to make a layer, as far
// as nothing was cloned from them.
func (m *mechanism) dropSnapshots(ctx context.Context, id string) error {
	rows, err := m.tool.rows(ctx, 2, "list", "-H", "-r", "-d", "2", "-t", "snapshot", "-o", "name,"+propLayer, m.parent)
	if err != nil {
		return err
	}
	for _, row := range rows {
		ds, snap, _ := splitSnapshot(row[0])
		layer, ok := strings.CutPrefix(ds, m.parent+"/")
		// A snapshot has the properties of its dataset.
		if !ok || row[1] != markOf(m.root, layer) || !strings.HasPrefix(snap, snapshotsFor(id)) {
			continue
		}
		if err := m.dropSnapshot(ctx, row[0]); err != nil {
			return err
		}
	}
	return nil
}

// dropSnapshot destroys a snapshot, now or with the last clone of it.
func (m *mechanism) dropSnapshot(ctx context.Context, full string) error {
	_, err := m.tool.run(ctx, "destroy", "-d", full)
	if says(err, textMissing, textNoSnapshot) {
		return nil
	}
	return err
}

// destroy destroys the dataset of a layer; none is no error. Layers that were
// cloned from it, which are not its children, get its history.
func (m *mechanism) destroy(ctx context.Context, id string) error {
	// A call that is left behind would destroy whatever has the name later.
	if err := m.answers(); err != nil {
		return err
	}
	if err := m.clearAsides(id); err != nil {
		return err
	}
	ds := m.dataset(id)
	done, err := m.destroyAtOnce(ctx, id)
	if done || err != nil {
		return err
	}
	rows, err := m.tool.rows(ctx, 1, "get", "-H", "-o", "value", propLayer, ds)
	if says(err, textMissing) {
		return nil
	}
	if err != nil {
		return err
	}
	if len(rows) != 1 || rows[0][0] != markOf(m.root, id) {
		return m.foreign(id)
	}
	err = m.patiently(ctx, func() error {
		_, err := m.tool.run(ctx, "destroy", ds)
		return err
	})
	switch {
	case err == nil, says(err, textMissing):
		return nil
	case says(err, textBusy):
		return fmt.Errorf("%w: %w", layerfs.ErrInUse, err)
	case !says(err, "has children", "has dependent clones"):
		return err
	}
	if err := m.release(ctx, ds); err != nil {
		return err
	}
	return m.patiently(ctx, func() error {
		_, err := m.tool.run(ctx, "destroy", ds)
		return err
	})
}

func (m *mechanism) foreign(id string) error {
	return fmt.Errorf("%s: %w: %w", m.dataset(id), layerfs.ErrExist, errForeign)
}

// destroyProgram destroys a dataset if it has the layer's mark, in one
// transaction: zfs-program(8). It returns what destroying it returns, 0 or an
// error number.
const destroyProgram = `local ds, mark = (...)["argv"][1], (...)["argv"][2]
if not zfs.exists(ds) then return "none" end
if zfs.get_prop(ds, "` + propLayer + `") ~= mark then return "foreign" end
return zfs.sync.destroy(ds)
`

// destroyAtOnce destroys the dataset of a layer by one call. It reports false if
// this zfs has no programs, or if something is in the way, which the ordinary
// calls deal with or name.
func (m *mechanism) destroyAtOnce(ctx context.Context, id string) (bool, error) {
	if m.facts.Program != "" {
		return false, nil
	}
	var out bytes.Buffer
	err := m.tool.pipe(ctx, strings.NewReader(destroyProgram), &out, m.tool.zfs,
		"program", "-j", m.tool.pool, "-", m.dataset(id), markOf(m.root, id))
	if err != nil {
		return false, err
	}
	var answer struct {
		Return any `json:"return"`
	}
	if err := json.Unmarshal(out.Bytes(), &answer); err != nil {
		return false, fmt.Errorf("zfs program printed %q: %w", out.Bytes(), err)
	}
	switch answer.Return {
	case "none", 0.:
		return true, nil
	case "foreign":
		return false, m.foreign(id)
	}
	return false, nil
}

// release makes that nothing depends on a dataset: its clones are promoted and
// its snapshots destroyed. A file system below it is none of ours and must go
// first.
func (m *mechanism) release(ctx context.Context, ds string) error {
	for {
		clone, err := m.cloneFrom(ctx, ds)
		if err != nil {
			return err
		}
		if clone == "" {
			break
		}
		if _, err := m.tool.run(ctx, "promote", clone); err != nil {
			return err
		}
	}
	rows, err := m.tool.rows(ctx, 2, "list", "-H", "-r", "-t", "filesystem,snapshot,volume", "-o", "name,type", ds)
	if err != nil {
		return err
	}
	for _, row := range rows {
		of, _, snapshot := splitSnapshot(row[0])
		if row[0] != ds && (!snapshot || of != ds) {
			return fmt.Errorf("%s is below a layer's dataset: %w", row[0], errForeign)
		}
	}
	for _, row := range rows {
		if row[0] == ds {
			continue
		}
		if err := m.dropSnapshot(ctx, row[0]); err != nil {
			return err
		}
	}
	return nil
}

// cloneFrom returns a layer's dataset whose origin is a snapshot of ds.
func (m *mechanism) cloneFrom(ctx context.Context, ds string) (string, error) {
	rows, err := m.tool.rows(ctx, 3, "list", "-H", "-r", "-t", "filesystem,volume", "-o", "name,origin,"+propLayer, m.tool.pool)
	if err != nil {
		return "", err
	}
	for _, row := range rows {
		of, _, ok := splitSnapshot(row[1])
		if !ok || of != ds {
			continue
		}
		id, ok := strings.CutPrefix(row[0], m.parent+"/")
		if !ok || row[2] != markOf(m.root, id) {
			return "", fmt.Errorf("%s was cloned from the layer: %w: %w", row[0], layerfs.ErrInUse, errForeign)
		}
		return row[0], nil
	}
	return "", nil
}

// Stored lists the layers that have a dataset or a directory. It is one call
// of zfs, whatever the number of layers.
func (m *mechanism) Stored(ctx context.Context) ([]string, error) {
	if err := m.answers(); err != nil {
		return nil, err // zfs may list what it remembers
	}
	rows, err := m.tool.rows(ctx, 2, "list", "-H", "-r", "-d", "1", "-t", "filesystem", "-o", "name,"+propLayer, m.parent)
	if err != nil {
		return nil, unusable(err)
	}
	ids := marked(rows, m.parent, m.root)
	there := make(map[string]bool, len(ids))
	for _, id := range ids {
		there[id] = true
	}
	m.listed.Store(&there)
	builds, err := m.dir.Builds()
	if err != nil {
		return nil, err
	}
	entries, err := os.ReadDir(m.graph())
	if err != nil {
		return nil, err
	}
	ids = append(ids, builds...)
	for _, e := range entries {
		ids = append(ids, e.Name())
	}
	slices.Sort(ids)
	return slices.Compact(ids), nil
}

// Find reports what of a layer is missing. A Check lists the datasets before it
// looks for each layer's, so that only those that were not in the list cost a
// call.
func (m *mechanism) Find(ctx context.Context, rec *lifecycle.Record) error {
	if there := m.listed.Load(); there != nil && (*there)[rec.ID] {
		return nil
	}
	rows, err := m.tool.rows(ctx, 1, "get", "-H", "-o", "value", propLayer, m.dataset(rec.ID))
	if err != nil {
		return err
	}
	if len(rows) != 1 || rows[0][0] != markOf(m.root, rec.ID) {
		return fmt.Errorf("%s: %w", m.dataset(rec.ID), errForeign)
	}
	return nil
}

// Apply unpacks into the layer, which nobody else sees.
func (m *mechanism) Apply(ctx context.Context, chain lifecycle.Chain, r io.Reader, opts *layerfs.ApplyOptions, touch func() error) (res layerfs.ApplyResult, err error) {
	// A stream that cannot even be begun must not spoil the layer.
	br := bufio.NewReaderSize(r, 4096)
	if _, err := br.Peek(1); err != nil && err != io.EOF {
		return res, err
	}
	rec := chain.Layer()
	if err := m.forget(ctx, rec.ID); err != nil {
		return res, err
	}
	view, err := m.private(ctx, rec, false)
	if err != nil {
		return res, err
	}
	defer func() { err = errors.Join(err, view.Release()) }()
	if err := touch(); err != nil {
		return res, err
	}
	res, err = archive.Apply(ctx, view.Path, br, &archive.ApplyOptions{ApplyOptions: *opts, Form: archive.Merged})
	// A quota is EDQUOT, of the layer, of RefQuota or of a dataset above; ENOSPC is
	// a full pool (dsl_dir_tempreserve_impl, module/zfs/dsl_dir.c).
	if errors.Is(err, syscall.EDQUOT) {
		err = fmt.Errorf("%w: %w", layerfs.ErrQuota, err)
	}
	return res, err
}

// Usage returns what destroying the layer would free, and the number of files
// it has more than its parent. It waits for the transaction group, because the
// counts are those of the last one.
func (m *mechanism) Usage(ctx context.Context, chain lifecycle.Chain) (u layerfs.Usage, err error) {
	rec := chain.Layer()
	if err := m.flush(ctx, rec.ID); err != nil {
		return u, err
	}
	rows, err := m.tool.rows(ctx, 1, "get", "-H", "-p", "-o", "value", "used", m.dataset(rec.ID))
	if err != nil {
		return u, err
	}
	if len(rows) != 1 {
		return u, fmt.Errorf("zfs printed %d values of used", len(rows))
	}
	if u.Bytes, err = strconv.ParseInt(rows[0][0], 10, 64); err != nil {
		return u, err
	}
	u.Inodes, err = m.objects(ctx, chain)
	return u, err
}

// objects counts the files a layer has more than its parent, with the root of
// a base layer.
func (m *mechanism) objects(ctx context.Context, chain lifecycle.Chain) (int64, error) {
	n, err := m.countFiles(ctx, chain)
	if err != nil || len(chain) == 1 {
		return n, err
	}
	below, err := m.countFiles(ctx, chain[1:])
	return max(n-below, 0), err
}

func (m *mechanism) countFiles(ctx context.Context, chain lifecycle.Chain) (n int64, err error) {
	view, err := m.View(ctx, chain)
	if err != nil {
		return 0, err
	}
	defer func() { err = errors.Join(err, view.Release()) }()
	n, err = filesIn(view.Path)
	return n - m.facts.Objects, err
}

// Sync makes the content of a layer durable.
func (m *mechanism) Sync(ctx context.Context, rec *lifecycle.Record) error {
	return m.flush(ctx, rec.ID)
}

// flush waits until all that was written to a layer is on the pool. A change
// of a property is part of a transaction group, like everything that was
// written before, and zfs returns when the group is on stable storage
// (dsl_sync_task, module/zfs/dsl_synctask.c).
func (m *mechanism) flush(ctx context.Context, id string) error {
	if err := m.sync(id); err != nil {
		return err
	}
	_, err := m.tool.run(ctx, "set", propLayer+"="+markOf(m.root, id), m.dataset(id))
	return err
}

// sync writes what the kernel still has of a layer, if it is mounted.
func (m *mechanism) sync(id string) error {
	if err := m.answers(); err != nil {
		return err
	}
	return syncMount(m.Path(id))
}

// SetQuota replaces the quota of a layer (property quota): the space that is
// the layer's own. ZFS enforces it with a delay of some seconds.
func (d *Driver) SetQuota(ctx context.Context, id string, q layerfs.Quota) error {
	return lifecycle.Update(ctx, d.frame, "set quota", id, func(_ lifecycle.Chain, rec *lifecycle.Record) error {
		switch {
		case q.Bytes < 0 || q.Inodes < 0:
			return fmt.Errorf("quota of %d bytes and %d inodes: negative", q.Bytes, q.Inodes)
		case q.Inodes > 0:
			return inodeQuota()
		}
		value := "none"
		if q.Bytes > 0 {
			value = strconv.FormatInt(q.Bytes, 10)
		}
		if _, err := d.m.tool.run(ctx, "set", "quota="+value, d.m.dataset(id)); err != nil {
			return err
		}
		rec.Quota = q
		return nil
	})
}

// Clone makes a layer with the parent and the content of another by one
// snapshot. The space they share stays until both are removed.
func (d *Driver) Clone(ctx context.Context, id, from string, opts *layerfs.CreateOptions) error {
	return lifecycle.Clone(ctx, d.frame, id, from, opts, func(rec *lifecycle.Record, from lifecycle.Chain, _ *layerfs.CreateOptions) error {
		src := from.Layer()
		if err := d.m.sync(src.ID); err != nil {
			return err
		}
		full, err := newSnapshot(d.m.dataset(src.ID), rec.ID)
		if err != nil {
			return err
		}
		return d.m.build(ctx, rec, func(props []string) error { return d.m.cloneOf(ctx, rec, full, props) })
	})
}

// Rollback makes the dataset of a layer anew. If it fails the layer is
// incomplete, and Rollback can be tried again.
func (d *Driver) Rollback(ctx context.Context, id string) error {
	if err := d.m.answers(); err != nil { // the layer stays as it is
		return &layerfs.Error{Op: "rollback", Driver: name, ID: id, Err: err}
	}
	return lifecycle.Rollback(ctx, d.frame, id, func(chain lifecycle.Chain) error {
		if err := d.m.destroy(ctx, id); err != nil {
			return err
		}
		if err := d.m.forgetName(id); err != nil {
			return err
		}
		return d.m.make(ctx, chain.Layer().Clone())
	})
}
