//go:build linux || freebsd

package zfs

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/layerfs/layerfs/internal/lifecycle"
	"github.com/layerfs/layerfs/internal/undo"
)

// momentPrefix is what the names of the snapshots begin with that last as long
// as a call.
const momentPrefix = snapshotPrefix + "now-"

// moment takes a snapshot of a layer that is pinned. A file beside the private
// mounts names it, by which New destroys it after a crash.
func (m *mechanism) moment(ctx context.Context, rec *lifecycle.Record) (full string, release func() error, err error) {
	unlock, err := m.dir.Lock(ctx, rec.ID)
	if err != nil {
		return "", nil, err
	}
	defer unlock()
	if err := m.sync(rec.ID); err != nil {
		return "", nil, err
	}
	full = m.dataset(rec.ID) + "@" + momentPrefix + random()
	note := filepath.Join(m.views.dir, fmt.Sprintf("%d.%s", m.serial.Add(1), rec.ID))
	var u undo.Stack
	defer u.Run(&err)
	if err := os.WriteFile(note, []byte(full), 0o600); err != nil {
		return "", nil, err
	}
	drop := func() error { return m.dropMoment(context.WithoutCancel(ctx), note, rec.ID) }
	u.Push(drop)
	_, err = m.tool.run(ctx, "snapshot", full)
	return full, drop, err
}

// answers returns an error if the pool is suspended: what waits for it in the
// kernel cannot be stopped. It reads a file of some bytes, and knows nothing where
// the kernel has none.
func (m *mechanism) answers() error {
	if m.tool.state() == stateSuspended {
		return fmt.Errorf("pool %s: %w", m.tool.pool, ErrSuspended)
	}
	return nil
}

// dropMoment destroys the snapshot of a layer that a file names, and removes
// the file.
func (m *mechanism) dropMoment(ctx context.Context, note, id string) error {
	b, err := os.ReadFile(note)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	// A file that a crash left empty names none.
	if full := string(b); strings.HasPrefix(full, m.dataset(id)+"@"+momentPrefix) {
		if err := m.dropSnapshot(ctx, full); err != nil {
			return err
		}
	}
	return removeDir(note)
}

// lasting returns the full name of a snapshot that shows a layer as it is, if
// there is one: its children were cloned from it, so it cannot have been written
// since, or it was received and was not written.
func (m *mechanism) lasting(rec *lifecycle.Record) string {
	name := m.sibling(&lifecycle.Record{Parent: rec.ID})
	if name == "" {
		name = m.received(rec.ID)
	}
	if name == "" {
		return ""
	}
	return m.dataset(rec.ID) + "@" + name
}

// since returns the full name of the snapshot of an ancestor that a layer goes
// back to by snapshots and clones alone, or none.
func (m *mechanism) since(chain lifecycle.Chain, base int) string {
	if base == len(chain) {
		return ""
	}
	name := ""
	for _, rec := range chain[:base] {
		if name = backendOf(rec).Snapshot; name == "" {
			return ""
		}
	}
	return m.dataset(chain[base].ID) + "@" + name
}

// sending runs "zfs send" of a pinned layer and calls read with what it writes.
// from is a snapshot of an ancestor, or empty.
func (m *mechanism) sending(ctx context.Context, rec *lifecycle.Record, from string, flags []string, read func(io.Reader) error) error {
	return m.still(ctx, rec, func(full string) error { return m.sendSnapshot(ctx, from, full, flags, read) })
}

// still calls fn with a snapshot that shows a pinned layer as it is. If fn's
// error says that the snapshot does not exist, it is called once more with
// another.
func (m *mechanism) still(ctx context.Context, rec *lifecycle.Record, fn func(full string) error) error {
	if full := m.lasting(rec); full != "" {
		err := fn(full)
		if !says(err, textMissing) {
			return err
		}
		// Its last child went since.
	}
	full, release, err := m.moment(ctx, rec)
	if err != nil {
		return err
	}
	return errors.Join(fn(full), release())
}

func (m *mechanism) sendSnapshot(ctx context.Context, from, full string, flags []string, read func(io.Reader) error) error {
	args := append([]string{"send"}, flags...)
	if from != "" {
		args = append(args, "-i", from)
	}
	r, w, err := os.Pipe()
	if err != nil {
		return err
	}
	ended := make(chan error, 1)
	go func() {
		err := m.tool.pipe(ctx, nil, w, m.tool.zfs, append(args, full)...)
		if unfinished(ctx, err) {
			_ = r.SetReadDeadline(time.Now()) // it fails if nobody reads any more
		}
		ended <- errors.Join(err, w.Close())
	}()
	readErr := read(r)
	r.Close() // zfs sees that nobody reads on
	err = <-ended
	if unfinished(ctx, err) && errors.Is(readErr, os.ErrDeadlineExceeded) {
		return err
	}
	if readErr != nil && (err == nil || !errors.Is(err, context.Cause(ctx)) && !says(err, textMissing)) {
		// zfs failed because of the reader, or the other way round: a stream
		// that was cut off is zfs's fault.
		return errors.Join(readErr, err)
	}
	return err
}
