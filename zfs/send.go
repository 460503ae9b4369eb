//go:build linux || freebsd

package zfs

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"slices"
	"strconv"
	"syscall"
	"time"

	"github.com/layerfs/layerfs"
	"github.com/layerfs/layerfs/internal/lifecycle"
)

// SendOptions are the options of [Driver.Send]. The zero value, and nil, are
// the defaults.
type SendOptions struct {
	// Compressed passes blocks on as they are stored: compressed, large and
	// embedded ones (zfs send -c -L -e). The receiver's pool must know them.
	Compressed bool
}

// Send writes a layer as a stream of ZFS's own format, as "zfs send" does: the
// whole layer, or with a base, which must be an ancestor, what differs from it.
// [Driver.Receive] and "zfs receive" read it. The layer may be in use: what is
// sent is a snapshot of this moment.
//
// A stream names its snapshot and that of its base by their GUIDs. Only a layer
// that has children, or that was received and not written since, is sent by a
// snapshot that lasts, so that a later stream can build on it. The error
// matches [errors.ErrUnsupported] if the layer does not go back to the base by
// snapshots and clones alone, as one made by Clone does not, and where the
// program lacks an option that it takes, as that of zfs-fuse does for all but a
// plain stream.
func (d *Driver) Send(ctx context.Context, w io.Writer, id, base string, opts *SendOptions) error {
	var flags []string
	if opts != nil && opts.Compressed {
		flags = []string{"-c", "-L", "-e"}
	}
	return lifecycle.Between(ctx, d.frame, "send", id, base, func(chain lifecycle.Chain, at int) error {
		from := d.m.since(chain, at)
		if from == "" && at < len(chain) {
			return &layerfs.UnsupportedError{Feature: "a send stream against " + base, Reason: "the layer was not cloned from it"}
		}
		err := d.m.sending(ctx, chain.Layer(), from, flags, func(r io.Reader) error {
			_, err := io.Copy(w, r)
			return err
		})
		return unlessOld("zfs send", err)
	})
}

// Receive makes a layer of a stream that [Driver.Send] or "zfs send" wrote. A
// stream against a base needs an ancestor of the new layer that was received, or
// has children, from the snapshot the stream builds on, and has not been written
// since; else the error matches [layerfs.ErrNotAncestor]. A full stream may have
// a parent too, which then only counts for Changes.
//
// It is all or nothing. The kernel reads the stream, and it is not made for
// streams of an enemy: receive from who is trusted. The error matches
// [layerfs.ErrMalformed] for what is no stream of one file system, and
// [errors.ErrUnsupported] with zfs-fuse, whose program cannot set properties.
//
// Streams that are to build on this one need the layer to stay as it is: its
// first writable Get, or Apply, makes it forget where it came from.
func (d *Driver) Receive(ctx context.Context, r io.Reader, id, parent string, opts *layerfs.CreateOptions) error {
	return lifecycle.Import(ctx, d.frame, "receive", id, parent, opts, func(rec *lifecycle.Record, chain lifecycle.Chain) error {
		if rec.Quota == (layerfs.Quota{}) {
			rec.Quota = d.m.opts.Quota
		}
		rec.Sealed = rec.ReadOnly
		return d.m.receive(ctx, r, rec, chain)
	})
}

func (m *mechanism) receive(ctx context.Context, r io.Reader, rec *lifecycle.Record, chain lifecycle.Chain) error {
	head := make([]byte, recordSize)
	if _, err := io.ReadFull(r, head); err != nil {
		return torn(err)
	}
	h, err := parseHeader(head)
	if err != nil {
		return err
	}
	var flags []string
	if h.from != 0 {
		origin, at, err := m.originOf(ctx, chain, h.from)
		if err != nil {
			return err
		}
		flags = []string{"-o", "origin=" + origin}
		if _, name, _ := splitSnapshot(origin); at == 0 {
			if err := keep(rec, name); err != nil {
				return err
			}
		}
	}
	// The stream can be read once, so what a crash left goes first.
	if err := m.destroy(ctx, rec.ID); err != nil {
		return err
	}
	full, err := newSnapshot(m.dataset(rec.ID), rec.ID)
	if err != nil {
		return err
	}
	_, name, _ := splitSnapshot(full)
	if err := m.remember(rec.ID, name); err != nil {
		return err
	}
	err = m.build(ctx, rec, func(props []string) error {
		return m.receiveStream(ctx, io.MultiReader(bytes.NewReader(head), r), slices.Concat([]string{"receive", "-u"}, flags, props, []string{full}))
	})
	if err != nil {
		return errors.Join(unlessOld("zfs receive", err), m.forgetName(rec.ID))
	}
	return nil
}

// unlessOld is the error of a command that an older program does not have in
// this form.
func unlessOld(feature string, err error) error {
	if says(err, textOption) {
		return &layerfs.UnsupportedError{Feature: feature, Reason: err.Error()}
	}
	return err
}

// receiveStream feeds a program. The error of the reader counts before the
// program's, which it caused.
func (m *mechanism) receiveStream(ctx context.Context, in io.Reader, args []string) error {
	r, w, err := os.Pipe()
	if err != nil {
		return err
	}
	ended := make(chan error, 1)
	go func() {
		err := m.tool.pipe(ctx, r, io.Discard, m.tool.zfs, args...)
		if unfinished(ctx, err) {
			_ = w.SetWriteDeadline(time.Now()) // it fails if nobody writes any more
		}
		ended <- errors.Join(err, r.Close())
	}()
	_, copyErr := io.Copy(w, in)
	err = errors.Join(w.Close(), <-ended)
	if errors.Is(copyErr, syscall.EPIPE) || unfinished(ctx, err) && errors.Is(copyErr, os.ErrDeadlineExceeded) {
		copyErr = nil // zfs has read enough, or says why not
	}
	if copyErr != nil {
		return copyErr
	}
	if says(err, "incomplete stream", "invalid stream", "bad magic", "checksum mismatch") {
		err = fmt.Errorf("%w: %w", layerfs.ErrMalformed, err)
	}
	return err
}

// originOf finds the snapshot with a GUID among those of a layer's ancestors.
func (m *mechanism) originOf(ctx context.Context, chain lifecycle.Chain, guid uint64) (full string, at int, err error) {
	args := []string{"list", "-H", "-p", "-d", "1", "-t", "snapshot", "-o", "name,guid"}
	for _, rec := range chain {
		args = append(args, m.dataset(rec.ID))
	}
	if len(chain) > 0 {
		rows, err := m.tool.rows(ctx, 2, args...)
		if err != nil {
			return "", 0, err
		}
		want := strconv.FormatUint(guid, 10)
		for _, row := range rows {
			if row[1] != want {
				continue
			}
			for at, rec := range chain {
				// Another snapshot may show what the layer was, not what it is.
				if row[0] == m.lasting(rec) {
					return row[0], at, nil
				}
			}
		}
	}
	return "", 0, fmt.Errorf("the stream builds on snapshot %d, which no ancestor has any more: %w", guid, layerfs.ErrNotAncestor)
}

// received returns the name of the snapshot that a layer was received as, if it
// has not been written since. A file keeps it, not the record, because a
// mechanism does not change the record of a layer that is got.
func (m *mechanism) received(id string) string {
	b, err := os.ReadFile(m.state("received", id))
	if err != nil {
		return ""
	}
	return string(b)
}

func (m *mechanism) remember(id, snapshot string) error {
	if err := os.MkdirAll(m.state("received"), 0o700); err != nil {
		return err
	}
	return os.WriteFile(m.state("received", id), []byte(snapshot), 0o600)
}

func (m *mechanism) forgetName(id string) error { return removeDir(m.state("received", id)) }

// forget destroys the snapshot that a layer was received as, before the layer is
// written.
func (m *mechanism) forget(ctx context.Context, id string) error {
	switch _, err := os.Lstat(m.state("received", id)); {
	case errors.Is(err, fs.ErrNotExist):
		return nil
	case err != nil:
		return err
	}
	if name := m.received(id); name != "" {
		if err := m.dropSnapshot(ctx, m.dataset(id)+"@"+name); err != nil {
			return err
		}
	}
	return m.forgetName(id)
}
