package devmapper

import (
	"context"
	"errors"
	"fmt"
	"io"
	"time"

	"github.com/layerfs/layerfs"
	"github.com/layerfs/layerfs/internal/lifecycle"
	"github.com/layerfs/layerfs/internal/undo"
)

// MigrateOptions are the options of [Driver.Migrate]. Nil means the defaults.
type MigrateOptions struct {
	// As is the id of the copy; empty means the same id. Ancestors keep theirs.
	As string

	// Rounds is the most rounds while the layer can be written; default 10.
	Rounds int

	// Small is the number of bytes that a round of ends the rounds with, as the
	// layer may stand still for about as long as the next one takes; default
	// 16 MiB. They also end when they get no smaller.
	Small int64

	// Verify reads the layer and the copy while the layer is frozen, and
	// compares what is in their blocks.
	Verify bool

	// Stop is called before the last round, while the layer can still be
	// written. It is for stopping those who write.
	Stop func(context.Context) error

	// Then is called when the copy is complete and usable, and the layer still
	// frozen: it is for having the copy take the layer's place. It must not
	// write to the layer. If it fails, so does Migrate.
	Then func(context.Context) error

	// Progress is called as often as a [layerfs.ProgressFunc].
	Progress func(MigrateProgress)
}

// MigrateProgress is how far [Driver.Migrate] is.
type MigrateProgress struct {
	ID     string // the layer, or one of its ancestors
	Round  int    // of the layer, from 1; 0 for an ancestor
	Frozen bool   // the layer is
	layerfs.Progress
}

// Migration is what [Driver.Migrate] has done.
type Migration struct {
	Copied []string        // ancestors that were copied too, base first
	There  []string        // ancestors that the destination had
	Rounds []MigratedRound // of the layer; the last one was sent while it was frozen
	Frozen time.Duration   // how long the layer was frozen
	Sum    BlockSum        // of the layer and of the copy, with Verify
}

// MigratedRound is one round of [Driver.Migrate].
type MigratedRound struct {
	Bytes int64
	Took  time.Duration
}

// Migrate copies a layer, which may be mounted and written meanwhile, to
// another root. Ancestors that the destination lacks are copied first; one that
// it has under the same id must be a copy of this one. Then the layer goes in
// rounds: all of it, what has changed since, until that is little. For the last
// round it is frozen: whoever writes waits until Migrate returns. So the copy
// is the layer as it was then.
//
// If it fails or ctx is done, what it has made is removed and the layer goes
// on. If the process is killed, the copy is incomplete, which nobody can use,
// and the next Migrate or Remove deletes it; ancestors that are whole stay. New
// on the root of the layer lets it go on, and deletes snapshots. Two calls may
// not make the same copy at a time: the error matches [layerfs.ErrInUse].
//
// Migrate takes no layer away. Whoever goes on writing to this one has two that
// differ.
func (d *Driver) Migrate(ctx context.Context, id string, to *Driver, opts *MigrateOptions) (Migration, error) {
	g := migration{from: d, to: to, id: id}
	if opts != nil {
		g.opts = *opts
	}
	if g.opts.As == "" {
		g.opts.As = id
	}
	if g.opts.Rounds == 0 {
		g.opts.Rounds = 10
	}
	if g.opts.Small == 0 {
		g.opts.Small = 16 << 20
	}
	err := g.run(ctx)
	if err != nil {
		return Migration{}, d.fail("migrate", id, err)
	}
	return g.done, nil
}

type migration struct {
	from, to *Driver
	id       string
	opts     MigrateOptions
	done     Migration
}

func (g *migration) run(ctx context.Context) (err error) {
	if g.opts.Rounds < 0 || g.opts.Small < 0 {
		return fmt.Errorf("%d rounds, until there are %d bytes: negative", g.opts.Rounds, g.opts.Small)
	}
	if err := layerfs.CheckID(g.opts.As); err != nil {
		return err
	}
	if g.from.m.root == g.to.m.root {
		return errors.New("the destination is the root of the layer")
	}
	chain, _, err := g.from.m.lineage(g.id, "")
	if err != nil {
		return err
	}
	unlock, ok, err := g.to.m.dir.TryLock(".migrate-" + g.opts.As)
	if err != nil {
		return err
	}
	if !ok {
		return fmt.Errorf("another process makes the layer %s there: %w", g.opts.As, layerfs.ErrInUse)
	}
	defer unlock()
	if err := g.clear(ctx); err != nil {
		return err
	}
	var u undo.Stack
	defer u.Run(&err)
	for i := len(chain) - 1; i > 0; i-- {
		if err := g.ancestor(ctx, chain[i], &u); err != nil {
			return fmt.Errorf("ancestor %s: %w", chain[i].ID, err)
		}
	}
	r, err := g.from.replicate(ctx, g.id, chain.Layer().Parent)
	if err != nil {
		return err
	}
	err = g.layer(ctx, r, chain.Layer(), &u)
	return errors.Join(err, r.close())
}

// clear makes sure that there is no layer in the copy's place but one that a
// process left half-made.
func (g *migration) clear(ctx context.Context) error {
	rec, err := g.to.m.dir.Load(g.opts.As)
	if errors.Is(err, layerfs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	if rec.Incomplete != unfinished {
		return fmt.Errorf("layer %s of the destination: %w", g.opts.As, layerfs.ErrExist)
	}
	return g.to.Remove(ctx, g.opts.As)
}

// createOptions are those of a copy.
func createOptions(rec *lifecycle.Record) layerfs.CreateOptions {
	return layerfs.CreateOptions{ReadOnly: rec.ReadOnly, Labels: rec.Labels, MountLabel: rec.MountLabel, Quota: rec.Quota}
}

// ancestor copies a layer that cannot change, or finds its copy.
func (g *migration) ancestor(ctx context.Context, rec *lifecycle.Record, u *undo.Stack) error {
	there, err := g.copyOf(rec)
	if err != nil {
		return err
	}
	if !there {
		err = pass(func(w io.Writer) error {
			return g.from.Send(ctx, rec.ID, rec.Parent, w, &SendOptions{Progress: g.progress(rec.ID, 0, false)})
		}, func(r io.Reader) error {
			return g.to.Receive(ctx, rec.ID, rec.Parent, r, &ReceiveOptions{Create: createOptions(rec)})
		})
		if errors.Is(err, layerfs.ErrExist) { // another process was first
			if there, err = g.copyOf(rec); err == nil && !there {
				err = layerfs.ErrExist
			}
		}
		if err != nil {
			return err
		}
	}
	if there {
		g.done.There = append(g.done.There, rec.ID)
		return nil
	}
	u.Push(func() error { return g.to.Remove(context.WithoutCancel(ctx), rec.ID) })
	g.done.Copied = append(g.done.Copied, rec.ID)
	return nil
}

// copyOf reports whether the destination has a copy of an ancestor.
func (g *migration) copyOf(rec *lifecycle.Record) (bool, error) {
	have, err := g.to.m.dir.Load(rec.ID)
	switch {
	case errors.Is(err, layerfs.ErrNotExist):
		return false, nil
	case err != nil:
		return false, err
	case have.Incomplete != "":
		return false, fmt.Errorf("that of the destination is not usable: %w: %s", layerfs.ErrIncomplete, have.Incomplete)
	}
	from, err := g.from.m.load(rec.ID)
	if err != nil {
		return false, err
	}
	to, err := g.to.m.load(rec.ID)
	if err != nil {
		return false, err
	}
	if from.State == "" || to.State != from.State || have.Parent != rec.Parent {
		return false, fmt.Errorf("that of the destination is not a copy of it: %w", layerfs.ErrExist)
	}
	return true, nil
}

// layer copies the layer itself.
func (g *migration) layer(ctx context.Context, r *Replica, rec *lifecycle.Record, u *undo.Stack) error {
	var before int64
	for n := 1; ; n++ {
		sent, err := g.round(ctx, r, rec, n, false)
		if n == 1 && err == nil {
			u.Push(func() error { return g.to.Remove(context.WithoutCancel(ctx), g.opts.As) })
		}
		if err != nil {
			return fmt.Errorf("round %d: %w", n, err)
		}
		g.from.m.step("migrate: round")
		// If a round is not much smaller, the layer is written about as fast
		// as it is copied.
		if n >= g.opts.Rounds || sent <= g.opts.Small || n > 1 && sent > before/4*3 {
			break
		}
		before = sent
	}
	if g.opts.Stop != nil {
		if err := g.opts.Stop(ctx); err != nil {
			return fmt.Errorf("stop: %w", err)
		}
	}
	start := time.Now()
	if err := r.freeze(ctx); err != nil {
		return fmt.Errorf("freeze: %w", err)
	}
	n := len(g.done.Rounds) + 1
	if _, err := g.round(ctx, r, rec, n, true); err != nil {
		return fmt.Errorf("last round: %w", err)
	}
	g.from.m.step("migrate: last round")
	if g.opts.Verify {
		if err := g.verify(ctx, r, n); err != nil {
			return err
		}
	}
	if err := g.to.FinishReceive(ctx, g.opts.As); err != nil {
		return err
	}
	if g.opts.Then != nil {
		if err := g.opts.Then(ctx); err != nil {
			return fmt.Errorf("then: %w", err)
		}
	}
	err := r.thaw()
	g.done.Frozen = time.Since(start)
	return err
}

func (g *migration) round(ctx context.Context, r *Replica, rec *lifecycle.Record, n int, frozen bool) (sent int64, err error) {
	start := time.Now()
	err = pass(func(w io.Writer) error {
		sent, err = r.send(ctx, w, &SendOptions{Progress: g.progress(g.id, n, frozen)})
		return err
	}, func(in io.Reader) error {
		if n == 1 {
			return g.to.Receive(ctx, g.opts.As, rec.Parent, in, &ReceiveOptions{Create: createOptions(rec), Unfinished: true})
		}
		return g.to.ReceiveUpdate(ctx, g.opts.As, in, nil)
	})
	if err == nil {
		g.done.Rounds = append(g.done.Rounds, MigratedRound{sent, time.Since(start)})
	}
	return sent, err
}

func (g *migration) verify(ctx context.Context, r *Replica, n int) error {
	progress := g.progress(g.id, n, true)
	want, err := g.from.m.sumOf(ctx, r.last, progress)
	if err != nil {
		return fmt.Errorf("read the blocks: %w", err)
	}
	got, err := g.to.m.blockSum(ctx, g.opts.As, progress)
	if err != nil {
		return fmt.Errorf("read the blocks of the copy: %w", err)
	}
	if got.Digest != want.Digest {
		return fmt.Errorf("the copy is not the same: its blocks are %s, and %s those of the layer", got.Digest, want.Digest)
	}
	g.done.Sum = want
	return nil
}

func (g *migration) progress(id string, round int, frozen bool) layerfs.ProgressFunc {
	if g.opts.Progress == nil {
		return nil
	}
	return func(p layerfs.Progress) { g.opts.Progress(MigrateProgress{id, round, frozen, p}) }
}

// errPeer is what one end of a pipe sees when the other has failed.
var errPeer = errors.New("the other end failed")

// pass has one function write what another reads, and returns what went wrong
// first.
func pass(send func(io.Writer) error, receive func(io.Reader) error) error {
	r, w := io.Pipe()
	received := make(chan error, 1)
	go func() {
		err := receive(r)
		_ = r.CloseWithError(errPeer)
		received <- err
	}()
	serr := send(w)
	if serr == nil {
		_ = w.Close()
	} else {
		_ = w.CloseWithError(errPeer)
	}
	rerr := <-received
	switch {
	case serr == nil:
		return rerr
	case rerr == nil || errors.Is(rerr, errPeer):
		return serr
	case errors.Is(serr, errPeer):
		return rerr
	}
	return errors.Join(serr, rerr)
}
