package lifecycle

import (
	"context"
	"errors"
	"fmt"
	"io"
	"iter"
	"os"
	"sync"

	"github.com/layerfs/layerfs"
	"github.com/layerfs/layerfs/archive"
)

// Changes yields what a layer changes against an ancestor.
func (d *Driver) Changes(ctx context.Context, id, base string) iter.Seq2[layerfs.Change, error] {
	return func(yield func(layerfs.Change, error) bool) {
		err := d.eachChange(ctx, id, base, func(c layerfs.Change) bool { return yield(c, nil) })
		if err != nil {
			yield(layerfs.Change{}, d.error("changes", id, err))
		}
	}
}

func (d *Driver) eachChange(ctx context.Context, id, base string, yield func(layerfs.Change) bool) error {
	chain, at, unpin, err := d.between(ctx, id, base)
	if err != nil {
		return err
	}
	defer unpin()
	for c, err := range d.changes(ctx, chain, at, nil) {
		if err != nil {
			return err
		}
		if !yield(c) {
			return nil
		}
	}
	return nil
}

// between pins a layer and finds its base in the chain.
func (d *Driver) between(ctx context.Context, id, base string) (_ Chain, at int, unpin func(), err error) {
	if base != "" {
		if err := layerfs.CheckID(base); err != nil {
			return nil, 0, nil, fmt.Errorf("base: %w", err)
		}
	}
	chain, unpin, err := d.pin(ctx, id, false)
	if err != nil {
		return nil, 0, nil, err
	}
	at = chain.Index(base)
	if at > 0 {
		return chain, at, unpin, nil
	}
	unpin()
	if _, err := d.dir.Load(base); err != nil {
		return nil, 0, nil, fmt.Errorf("base %s: %w", base, err)
	}
	return nil, 0, nil, fmt.Errorf("base %s: %w", base, layerfs.ErrNotAncestor)
}

// changes asks the mechanism, and walks both trees if it cannot tell.
func (d *Driver) changes(ctx context.Context, chain Chain, base int, progress layerfs.ProgressFunc) iter.Seq2[layerfs.Change, error] {
	native, ok := d.m.(NativeChanger)
	if !ok {
		return d.walk(ctx, chain, base, progress)
	}
	return func(yield func(layerfs.Change, error) bool) {
		for c, err := range native.NativeChanges(ctx, chain, base) {
			if errors.Is(err, ErrDecline) {
				d.opts.Logger.Debug("changes are found by walking", "driver", d.m.Name(), "layer", chain.Layer().ID, "reason", err)
				d.walk(ctx, chain, base, progress)(yield)
				return
			}
			if !yield(c, err) || err != nil {
				return
			}
		}
	}
}

// walk compares the merged trees.
func (d *Driver) walk(ctx context.Context, chain Chain, base int, progress layerfs.ProgressFunc) iter.Seq2[layerfs.Change, error] {
	return func(yield func(layerfs.Change, error) bool) {
		if err := d.compare(ctx, chain, base, progress, yield); err != nil {
			yield(layerfs.Change{}, err)
		}
	}
}

func (d *Driver) compare(ctx context.Context, chain Chain, base int, progress layerfs.ProgressFunc, yield func(layerfs.Change, error) bool) (err error) {
	newer, err := d.m.View(ctx, chain)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, newer.Release()) }()
	older, err := d.olderView(ctx, chain[base:])
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, older.Release()) }()
	opts := &archive.CompareOptions{Progress: progress}
	if base == 1 {
		opts.Since = d.dir.Reliable(chain.Layer().Copied)
	}
	for c, err := range archive.Compare(ctx, older.Path, newer.Path, opts) {
		if err != nil {
			return err
		}
		if base == len(chain) && c.Path == "/" {
			continue // the directory that stands for the empty tree is none of the layer's
		}
		if !yield(c, nil) {
			return nil
		}
	}
	return nil
}

// olderView shows the empty tree for an empty chain.
func (d *Driver) olderView(ctx context.Context, chain Chain) (View, error) {
	if len(chain) > 0 {
		return d.m.View(ctx, chain)
	}
	empty, err := os.MkdirTemp("", "layerfs-empty-")
	if err != nil {
		return View{}, err
	}
	return View{Path: empty, Release: func() error { return os.Remove(empty) }}, nil
}

// Diff returns a tar stream of what a layer adds to an ancestor.
func (d *Driver) Diff(ctx context.Context, id, base string, opts *layerfs.DiffOptions) (_ io.ReadCloser, err error) {
	defer d.wrap("diff", id, &err)
	if opts == nil {
		opts = new(layerfs.DiffOptions)
	}
	options := &archive.WriteOptions{DiffOptions: *opts}
	if err := options.Validate(); err != nil {
		return nil, err
	}
	chain, at, unpin, err := d.between(ctx, id, base)
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithCancelCause(ctx)
	r, w := io.Pipe()
	s := &stream{PipeReader: r, cancel: cancel}
	s.done.Go(func() {
		defer unpin()
		w.CloseWithError(d.error("diff", id, d.write(ctx, w, chain, at, options)))
	})
	return s, nil
}

func (d *Driver) write(ctx context.Context, w io.Writer, chain Chain, base int, opts *archive.WriteOptions) (err error) {
	if native, ok := d.m.(NativeDiffer); ok {
		err := native.NativeDiff(ctx, w, chain, base, &opts.DiffOptions)
		if !errors.Is(err, ErrDecline) {
			return err
		}
	}
	view, err := d.m.View(ctx, chain)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, view.Release()) }()
	if base == len(chain) {
		_, err = archive.Write(ctx, w, view.Path, opts)
		return err
	}
	_, err = archive.WriteChanges(ctx, w, view.Path, d.changes(ctx, chain, base, nil), opts)
	return err
}

// stream is a diff that is being made. Close stops it and waits, so that the
// layer is no longer held when it returns.
type stream struct {
	*io.PipeReader
	cancel context.CancelCauseFunc
	done   sync.WaitGroup
}

// errClosed is what a reader that gave up sees; nobody else does.
var errClosed = errors.New("diff closed")

// Close ends the stream and releases the layer.
func (s *stream) Close() error {
	s.cancel(errClosed)
	err := s.PipeReader.CloseWithError(errClosed)
	s.done.Wait()
	return err
}
