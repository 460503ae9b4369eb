package main

import (
	"context"
	"fmt"
	"io"

	"github.com/layerfs/layerfs"
	"github.com/layerfs/layerfs/btrfs"
	"github.com/layerfs/layerfs/devmapper"
	"github.com/layerfs/layerfs/zfs"
)

// streamerOf finds the streamer among a driver and what it wraps.
func streamerOf(d layerfs.Driver) (streamer, error) {
	for inner := d; inner != nil; inner = unwrap(inner) {
		switch x := inner.(type) {
		case *btrfs.Driver:
			return fileStreamer{func(ctx context.Context, w io.Writer, id, base string) error { return x.Send(ctx, w, id, base, nil) }, x.Receive}, nil
		case *zfs.Driver:
			return fileStreamer{func(ctx context.Context, w io.Writer, id, base string) error { return x.Send(ctx, w, id, base, nil) }, x.Receive}, nil
		case *devmapper.Driver:
			return devmapperStreamer{x}, nil
		}
	}
	return nil, errNoStreamer(d)
}

func migratorOf(d layerfs.Driver) (migrator, error) {
	for inner := d; inner != nil; inner = unwrap(inner) {
		if x, ok := inner.(*devmapper.Driver); ok {
			return devmapperStreamer{x}, nil
		}
	}
	return nil, errNoMigrator(d)
}

func unwrap(d layerfs.Driver) layerfs.Driver {
	if w, ok := d.(interface{ Unwrap() layerfs.Driver }); ok {
		return w.Unwrap()
	}
	return nil
}

// fileStreamer is for the file systems that write the streams themselves.
type fileStreamer struct {
	sendLayer    func(ctx context.Context, w io.Writer, id, base string) error
	receiveLayer func(ctx context.Context, r io.Reader, id, parent string, opts *layerfs.CreateOptions) error
}

// counted reports what went through a stream: they do not know how much is to
// come.
type counted struct {
	n        int64
	progress layerfs.ProgressFunc
}

func (c *counted) Write(p []byte) (int, error) {
	c.n += int64(len(p))
	c.progress(layerfs.Progress{Bytes: c.n})
	return len(p), nil
}

func (s fileStreamer) send(ctx context.Context, w io.Writer, id, base string, progress layerfs.ProgressFunc) error {
	return s.sendLayer(ctx, io.MultiWriter(w, &counted{progress: progress}), id, base)
}

func (s fileStreamer) receive(ctx context.Context, r io.Reader, id, parent string, opts *layerfs.CreateOptions, progress layerfs.ProgressFunc) error {
	return s.receiveLayer(ctx, io.TeeReader(r, &counted{progress: progress}), id, parent, opts)
}

type devmapperStreamer struct{ d *devmapper.Driver }

func (s devmapperStreamer) send(ctx context.Context, w io.Writer, id, base string, progress layerfs.ProgressFunc) error {
	return s.d.Send(ctx, id, base, w, &devmapper.SendOptions{Progress: progress})
}

func (s devmapperStreamer) receive(ctx context.Context, r io.Reader, id, parent string, opts *layerfs.CreateOptions, progress layerfs.ProgressFunc) error {
	return s.d.Receive(ctx, id, parent, r, &devmapper.ReceiveOptions{Create: *opts, Progress: progress})
}

func (s devmapperStreamer) migrate(ctx context.Context, dst layerfs.Driver, id string, run migrateRun) (migratedJSON, error) {
	to, err := streamerOf(dst)
	if err != nil {
		return migratedJSON{}, err
	}
	opts := &devmapper.MigrateOptions{
		As: run.as, Rounds: run.rounds, Small: run.until, Verify: run.verify,
		Progress: func(p devmapper.MigrateProgress) {
			what := "copy " + p.ID
			switch {
			case p.Phase == "compare":
				what = "compare " + p.ID
			case p.Frozen:
				what += ", last round"
			case p.Round > 0:
				what += fmt.Sprintf(", round %d", p.Round)
			}
			run.progress(what, p.Progress)
		},
	}
	if run.stop != "" {
		opts.Stop = func(ctx context.Context) error { return run.hook(ctx, run.stop) }
	}
	if run.then != "" {
		opts.Then = func(ctx context.Context) error { return run.hook(ctx, run.then) }
	}
	done, err := s.d.Migrate(ctx, id, to.(devmapperStreamer).d, opts)
	if err != nil {
		return migratedJSON{}, err
	}
	m := migratedJSON{
		ID: run.as, From: id, Copied: append([]string{}, done.Copied...), There: append([]string{}, done.There...),
		Frozen: done.Frozen.Seconds(), Verified: run.verify, Digest: done.Sum.Digest, Compared: done.Sum.Bytes,
	}
	for _, r := range done.Rounds {
		m.Rounds = append(m.Rounds, roundJSON{r.Bytes, r.Took.Seconds()})
	}
	return m, nil
}
