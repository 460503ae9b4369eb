// Package transfer fills layers from trees and streams and copies them between
// drivers, with the verbs of layerfs.Driver alone.
package transfer

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"slices"

	"github.com/layerfs/layerfs"
	"github.com/layerfs/layerfs/archive"
)

// Source is where the content of a layer comes from.
type Source func(ctx context.Context) (io.ReadCloser, error)

// Tree is the stream of all that is in a directory, with everything that tar
// can hold.
func Tree(dir string) Source {
	return func(ctx context.Context) (io.ReadCloser, error) {
		ctx, cancel := context.WithCancel(ctx)
		r, w := io.Pipe()
		done := make(chan struct{})
		go func() {
			defer close(done)
			_, err := archive.Write(ctx, w, dir, nil)
			w.CloseWithError(err)
		}()
		return &pipe{PipeReader: r, stop: func() { cancel(); r.Close(); <-done }}, nil
	}
}

// pipe waits at Close for whoever writes it.
type pipe struct {
	*io.PipeReader
	stop func()
}

func (p *pipe) Close() error {
	p.stop()
	return nil
}

// Stream is a stream that can be read once. It is not closed.
func Stream(r io.Reader) Source {
	return func(context.Context) (io.ReadCloser, error) { return io.NopCloser(r), nil }
}

// Import makes layer id on parent with the content of src. All or nothing: if
// anything fails, the layer is removed again, also if ctx is done.
func Import(ctx context.Context, d layerfs.Driver, id, parent string, src Source, create *layerfs.CreateOptions, apply *layerfs.ApplyOptions) (layerfs.ApplyResult, error) {
	return fill(ctx, d, id, parent, create, func() (layerfs.ApplyResult, error) {
		r, err := src(ctx)
		if err != nil {
			return layerfs.ApplyResult{}, err
		}
		res, err := d.Apply(ctx, id, r, apply)
		return res, errors.Join(err, r.Close())
	})
}

// fill creates a layer and removes it again if its content cannot be made.
func fill(ctx context.Context, d layerfs.Driver, id, parent string, opts *layerfs.CreateOptions, content func() (layerfs.ApplyResult, error)) (layerfs.ApplyResult, error) {
	if err := d.Create(ctx, id, parent, opts); err != nil {
		return layerfs.ApplyResult{}, err
	}
	res, err := content()
	if err != nil {
		if rerr := d.Remove(context.WithoutCancel(ctx), id); rerr != nil {
			err = fmt.Errorf("%w (rollback: %v)", err, rerr)
		}
	}
	return res, err
}

// Options are the options of [Copy].
type Options struct {
	// As is the id of the copy; empty means the same id. Ancestors keep theirs.
	As string
	// Verify compares the merged trees of each copied layer afterwards.
	Verify bool
	// NoQuota leaves the quotas behind.
	NoQuota bool
	// Apply are the options of each Apply at the destination.
	Apply layerfs.ApplyOptions
	// Progress is called with the id of the layer that is being copied.
	Progress func(id string, p layerfs.Progress)
	// Copied is called after each layer that was copied or found there.
	Copied func(Layer)
}

// Layer is one layer that [Copy] copied or found at its destination.
type Layer struct {
	ID       string // at the destination
	From     string // at the source
	Parent   string // at the destination
	Existed  bool   // it was there, and was not looked into
	Verified bool   // the trees were compared
	Result   layerfs.ApplyResult
}

// Copy copies a layer and those of its ancestors that dst lacks, base first.
//
// The stream is what Diff gives with everything that tar can hold. Its digest
// is taken where it leaves the source and must be that of Apply. An ancestor
// that is at the destination under the same id and on the same parent is
// taken for the same.
//
// A layer whose copy fails is removed; ancestors that are whole stay, so that
// another try goes on from there.
func Copy(ctx context.Context, src, dst layerfs.Driver, id string, opts *Options) error {
	if opts == nil {
		opts = new(Options)
	}
	chain, err := ancestry(ctx, src, id)
	if err != nil {
		return err
	}
	for i, info := range chain {
		l := Layer{ID: info.ID, From: info.ID, Parent: info.Parent}
		if last := i == len(chain)-1; last && opts.As != "" {
			l.ID = opts.As
		} else if !last {
			there, err := found(ctx, dst, info)
			if err != nil {
				return err
			}
			l.Existed = there
		}
		if !l.Existed {
			if err := copyLayer(ctx, src, dst, info, &l, opts); err != nil {
				return fmt.Errorf("copy %s: %w", info.ID, err)
			}
		}
		if opts.Copied != nil {
			opts.Copied(l)
		}
	}
	return nil
}

// ancestry describes a layer and its ancestors, base first.
func ancestry(ctx context.Context, d layerfs.Driver, id string) ([]layerfs.Info, error) {
	var chain []layerfs.Info
	for at := id; at != ""; {
		info, err := d.Stat(ctx, at, nil)
		if err != nil {
			return nil, err
		}
		if info.Incomplete != "" {
			return nil, fmt.Errorf("%s: %w: %s", at, layerfs.ErrIncomplete, info.Incomplete)
		}
		if slices.ContainsFunc(chain, func(i layerfs.Info) bool { return i.ID == at }) {
			return nil, fmt.Errorf("%s: %w: it is its own ancestor", at, layerfs.ErrIncomplete)
		}
		chain = append(chain, info)
		at = info.Parent
	}
	slices.Reverse(chain)
	return chain, nil
}

// found reports whether dst has a layer like info.
func found(ctx context.Context, dst layerfs.Driver, info layerfs.Info) (bool, error) {
	have, err := dst.Stat(ctx, info.ID, nil)
	switch {
	case errors.Is(err, layerfs.ErrNotExist):
		return false, nil
	case err != nil:
		return false, err
	case have.Parent != info.Parent:
		return false, fmt.Errorf("layer %s of the destination is another one: its parent is %q, not %q: %w", info.ID, have.Parent, info.Parent, layerfs.ErrExist)
	case have.Incomplete != "":
		return false, fmt.Errorf("layer %s of the destination: %w: %s", info.ID, layerfs.ErrIncomplete, have.Incomplete)
	}
	return true, nil
}

func copyLayer(ctx context.Context, src, dst layerfs.Driver, info layerfs.Info, l *Layer, opts *Options) error {
	create := &layerfs.CreateOptions{ReadOnly: info.ReadOnly, Labels: info.Labels, Quota: info.Quota}
	if opts.NoQuota {
		create.Quota = layerfs.Quota{}
	}
	res, err := fill(ctx, dst, l.ID, l.Parent, create, func() (layerfs.ApplyResult, error) {
		res, err := pour(ctx, src, dst, info, l.ID, opts)
		if err != nil || !opts.Verify {
			return res, err
		}
		if err := same(ctx, src, dst, info.ID, l.ID); err != nil {
			return res, err
		}
		l.Verified = true
		return res, nil
	})
	l.Result = res
	return err
}

// pour applies the stream of a layer, and compares the digests of both ends.
func pour(ctx context.Context, src, dst layerfs.Driver, info layerfs.Info, id string, opts *Options) (layerfs.ApplyResult, error) {
	diff := new(layerfs.DiffOptions)
	if opts.Progress != nil {
		diff.Progress = func(p layerfs.Progress) { opts.Progress(info.ID, p) }
	}
	r, err := src.Diff(ctx, info.ID, info.Parent, diff)
	if err != nil {
		return layerfs.ApplyResult{}, err
	}
	sum := sha256.New()
	res, err := dst.Apply(ctx, id, io.TeeReader(r, sum), &opts.Apply)
	if err = errors.Join(err, r.Close()); err != nil {
		return res, err
	}
	if sent := "sha256:" + hex.EncodeToString(sum.Sum(nil)); sent != res.Digest {
		return res, fmt.Errorf("the source sent %s and the destination read %s", sent, res.Digest)
	}
	return res, nil
}

// same compares the merged trees of two layers.
func same(ctx context.Context, a, b layerfs.Driver, aID, bID string) error {
	n := 0
	var first layerfs.Change
	for c, err := range Compare(ctx, a, b, aID, bID) {
		if err != nil {
			return fmt.Errorf("verify: %w", err)
		}
		if n++; n == 1 {
			first = c
		}
	}
	if n > 0 {
		return fmt.Errorf("the trees differ in %d places, such as %q", n, first.String())
	}
	return nil
}
