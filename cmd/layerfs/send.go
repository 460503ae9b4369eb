package main

import (
	"bufio"
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/urfave/cli/v3"

	"github.com/layerfs/layerfs"
	"github.com/layerfs/layerfs/auto"
)

// streamer is a driver that can write a layer as a stream of its own format,
// which says more than a tar stream or costs less.
type streamer interface {
	send(ctx context.Context, w io.Writer, id, base string, progress layerfs.ProgressFunc) error
	receive(ctx context.Context, r io.Reader, id, parent string, opts *layerfs.CreateOptions, progress layerfs.ProgressFunc) error
}

// streamFormat is how a driver's streams begin.
type streamFormat struct {
	driver string
	at     int // bytes before the magic
	magic  string
}

func streamFormats() []streamFormat {
	return []streamFormat{
		{"btrfs", 0, "btrfs-stream\x00"},               // include/uapi/linux/btrfs.h does not have it; fs/btrfs/send.h, BTRFS_SEND_STREAM_MAGIC
		{"devmapper", 0, "LFSBLK\x00"},                 // package devmapper
		{"zfs", 8, "\xac\xcb\xba\xf5\x02\x00\x00\x00"}, // include/sys/zfs_ioctl.h, drr_begin, DMU_BACKUP_MAGIC, of a little-endian host
		{"zfs", 8, "\x00\x00\x00\x02\xf5\xba\xcb\xac"},
	}
}

// errNoStreamer says what a driver lacks.
func errNoStreamer(d layerfs.Driver) error {
	var have []string
	for _, f := range streamFormats() {
		if !slices.Contains(have, f.driver) {
			have = append(have, f.driver)
		}
	}
	return &layerfs.UnsupportedError{
		Feature: "a stream of the driver " + d.Name(), Reason: "only " + strings.Join(have, ", ") + " have one; diff and apply, or copy, work with every driver",
	}
}

func (a *app) send() *cli.Command {
	return &cli.Command{
		Name: "send", Usage: "write a layer as a stream of its driver's own format", ArgsUsage: "ID", Category: "content",
		Description: "devmapper writes the blocks of the layer's device, which may be in use, btrfs and zfs what \"btrfs send\" and \"zfs send\" write.\nreceive makes the same layer elsewhere. With --from the stream has only what differs from an ancestor,\nand needs a parent that was received from that ancestor's stream and not written since.",
		Flags: []cli.Flag{
			&cli.StringFlag{Name: "from", Usage: "only what differs from this ancestor `ID`"},
			&cli.StringFlag{Name: "output", Aliases: []string{"o"}, Value: "-", Usage: "`FILE` to write, whole or not at all; - is standard output"},
		},
		Action: func(ctx context.Context, cmd *cli.Command) error {
			arg, err := args(cmd, 1, 1)
			if err != nil {
				return err
			}
			name := cmd.String("output")
			switch {
			case name == "-" && isTerminal(a.out):
				return usagef("a stream does not belong on a terminal: name a file with -o, or use | or >")
			case name == "-" && a.json:
				return usagef("--json needs -o FILE, as the stream takes standard output")
			}
			d, err := a.existing()
			return with(d, err, func(d layerfs.Driver) error {
				s, err := streamerOf(d)
				if err != nil {
					return err
				}
				return a.writeStream(ctx, s, arg[0], cmd.String("from"), name)
			})
		},
	}
}

// writeStream writes the stream of a layer to a file, which appears whole or
// not at all, or to standard output.
func (a *app) writeStream(ctx context.Context, s streamer, id, from, name string) error {
	bar := a.meter("send "+id, 0)
	defer bar.done()
	sum := &summed{hash: sha256.New()}
	write := func(w io.Writer) error {
		return s.send(ctx, interruptibleWriter{ctx, io.MultiWriter(w, sum)}, id, from, bar.set)
	}
	if name == "-" {
		return write(a.out)
	}
	err := writeWhole(name, write)
	bar.done()
	if err != nil {
		return err
	}
	digest := "sha256:" + hex.EncodeToString(sum.hash.Sum(nil))
	switch {
	case a.json:
		return writeJSON(a.out, sentJSON{ID: id, From: from, File: name, Bytes: sum.n, Digest: digest})
	case a.quiet:
		return nil
	}
	return a.say("%s: %s\n%s", name, humanBytes(sum.n), digest)
}

// interruptibleWriter ends a stream with the context, at the next write: not
// all drivers look at it in between.
type interruptibleWriter struct {
	ctx context.Context
	w   io.Writer
}

func (w interruptibleWriter) Write(p []byte) (int, error) {
	if err := context.Cause(w.ctx); err != nil {
		return 0, err
	}
	return w.w.Write(p)
}

func (a *app) receive() *cli.Command {
	return &cli.Command{
		Name: "receive", Usage: "make a layer of a stream of send", ArgsUsage: "ID [FILE|-]", Category: "content",
		Description: "If anything fails, no layer is left. A stream made with --from needs --parent.\nWhat is in a stream of devmapper is a file system that the kernel mounts: receive from those alone whose disks you would mount.",
		Flags: append(createFlags(),
			&cli.StringFlag{Name: "parent", Usage: "make the layer on top of `ID`"}),
		Action: func(ctx context.Context, cmd *cli.Command) error {
			arg, err := args(cmd, 1, 2)
			if err != nil {
				return err
			}
			create, err := createOptions(cmd)
			if err != nil {
				return err
			}
			if err := layerfs.CheckID(arg[0]); err != nil {
				return err
			}
			in, closeStream, err := a.stream(ctx, arg[1])
			if err != nil {
				return err
			}
			defer closeStream()
			format, err := formatOf(in)
			if err != nil {
				return err
			}
			to, err := a.placeFor(format)
			if err != nil {
				return err
			}
			d, err := a.openAt(to)
			return with(d, err, func(d layerfs.Driver) error {
				if d.Name() != format.driver {
					return &layerfs.UnsupportedError{Feature: "receiving a stream of " + format.driver, Reason: "the layers here are those of " + d.Name()}
				}
				s, err := streamerOf(d)
				if err != nil {
					return err
				}
				bar := a.meter("receive "+arg[0], 0)
				defer bar.done()
				sum := &summed{hash: sha256.New()}
				if err := s.receive(ctx, io.TeeReader(in, sum), arg[0], cmd.String("parent"), create, bar.set); err != nil {
					return err
				}
				bar.done()
				switch {
				case a.json:
					return writeJSON(a.out, receivedJSON{ID: arg[0], Parent: cmd.String("parent"), Driver: format.driver, Bytes: sum.n})
				case a.quiet:
					return nil
				}
				return a.say("%s: received, a stream of %s with %s", arg[0], format.driver, humanBytes(sum.n))
			})
		},
	}
}

// stream opens a file or, as "-", standard input.
func (a *app) stream(ctx context.Context, name string) (*bufio.Reader, func() error, error) {
	const large = 1 << 20
	if name != "" && name != "-" {
		if fi, err := os.Stat(name); err == nil && fi.IsDir() {
			return nil, nil, usagef("%s is a directory, and not a stream of send", name)
		}
	}
	src, _, closeSource, err := a.source(name)
	if err != nil {
		return nil, nil, err
	}
	r, err := src(ctx)
	if err != nil {
		return nil, nil, errors.Join(err, closeSource())
	}
	return bufio.NewReaderSize(r, large), func() error { return errors.Join(r.Close(), closeSource()) }, nil
}

// formatOf tells whose stream it is. It reads nothing that is not read again.
func formatOf(r *bufio.Reader) (streamFormat, error) {
	for _, f := range streamFormats() {
		head, err := r.Peek(f.at + len(f.magic))
		if err != nil && err != io.EOF {
			return streamFormat{}, err
		}
		if len(head) >= f.at && bytes.Equal(head[f.at:], []byte(f.magic)) {
			return f, nil
		}
	}
	return streamFormat{}, fmt.Errorf("it does not begin as a stream of send: %w", layerfs.ErrMalformed)
}

// placeFor is where a stream goes: a root that is new gets the driver that the
// stream is of.
func (a *app) placeFor(f streamFormat) (place, error) {
	p := a.place()
	if p.driver != "" || p.root == "" {
		return p, nil
	}
	prior, err := auto.Prior(p.root)
	if err == nil && len(prior) == 0 {
		p.driver = f.driver
	}
	return p, err
}

func (a *app) migrate() *cli.Command {
	return &cli.Command{
		Name: "migrate", Usage: "copy a layer that is in use to another root, in rounds", ArgsUsage: "ID", Category: "content",
		Description: "Copies the ancestors that are missing there and all of the layer, then what was written meanwhile, until that\n" +
			"is little. For the last round the layer is frozen: what writes to it waits. After it the copy is the same, and\n" +
			"writing goes on. If anything fails, no copy is left. Only devmapper can do it.\n\n" +
			"The commands of --stop and --then are run by /bin/sh with LAYERFS_FROM_ROOT, LAYERFS_FROM_ID, LAYERFS_TO_ROOT and\n" +
			"LAYERFS_TO_ID in the environment. Their output goes to standard error.",
		Flags: []cli.Flag{
			&cli.StringFlag{Name: "to", Usage: "`DIR` of the copy", Required: true},
			&cli.StringSliceFlag{Name: "to-opt", Usage: "`DRIVER.KEY=VALUE`, an option of the driver there; may be repeated"},
			&cli.StringFlag{Name: "as", Usage: "`ID` of the copy; default: the same"},
			&cli.BoolFlag{Name: "verify", Usage: "read all blocks of both while the layer is frozen, and compare"},
			&cli.IntFlag{Name: "rounds", Value: 10, Usage: "at most `NUMBER` before the last one"},
			&cli.StringFlag{Name: "until", Value: "16M", Usage: "freeze after a round of no more than these `BYTES`"},
			&cli.StringFlag{Name: "stop", Usage: "`COMMAND` to run before the last round, to stop what writes"},
			&cli.StringFlag{Name: "then", Usage: "`COMMAND` to run when the copy is complete and the layer still frozen; it must not use the layer"},
		},
		Action: func(ctx context.Context, cmd *cli.Command) error {
			arg, err := args(cmd, 1, 1)
			if err != nil {
				return err
			}
			o := migrateOptions{
				as: cmd.String("as"), verify: cmd.Bool("verify"), rounds: cmd.Int("rounds"),
				stop: cmd.String("stop"), then: cmd.String("then"),
			}
			if o.as == "" {
				o.as = arg[0]
			}
			if err := errors.Join(layerfs.CheckID(arg[0]), layerfs.CheckID(o.as)); err != nil {
				return err
			}
			if o.until, err = parseSize(cmd.String("until")); err != nil {
				return err
			}
			if o.rounds < 1 {
				return usagef("--rounds %d: there is at least one", o.rounds)
			}
			if o.to, err = filepath.Abs(cmd.String("to")); err != nil {
				return err
			}
			d, err := a.existing()
			return with(d, err, func(src layerfs.Driver) error {
				if sameRoot(o.to, a.root) {
					return usagef("the copy would be where the layer is: give another --to")
				}
				m, err := migratorOf(src)
				if err != nil {
					return err
				}
				// A typing mistake in the id must not make a root.
				if _, err := src.Stat(ctx, arg[0], nil); err != nil {
					return err
				}
				dst, err := a.openAt(place{o.to, src.Name(), cmd.StringSlice("to-opt")})
				return with(dst, err, func(dst layerfs.Driver) error { return a.migrateLayer(ctx, m, dst, arg[0], &o) })
			})
		},
	}
}

// migrateOptions are the flags of migrate.
type migrateOptions struct {
	to, as     string
	verify     bool
	rounds     int
	until      int64
	stop, then string // commands
}

// migrator is a driver that can copy a layer that is in use.
type migrator interface {
	migrate(ctx context.Context, dst layerfs.Driver, id string, run migrateRun) (migratedJSON, error)
}

// migrateRun is what a migrator needs besides the flags.
type migrateRun struct {
	*migrateOptions
	hook     func(ctx context.Context, command string) error
	progress func(what string, p layerfs.Progress)
}

func errNoMigrator(d layerfs.Driver) error {
	return &layerfs.UnsupportedError{
		Feature: "copying a layer in use with the driver " + d.Name(), Reason: "only devmapper knows which blocks were written; copy works with every driver, for layers nobody writes",
	}
}

func (a *app) migrateLayer(ctx context.Context, m migrator, dst layerfs.Driver, id string, o *migrateOptions) error {
	bars := meters{a: a}
	defer bars.done()
	from, err := filepath.Abs(a.root)
	if err != nil {
		return err
	}
	env := []string{"LAYERFS_FROM_ROOT=" + from, "LAYERFS_FROM_ID=" + id, "LAYERFS_TO_ROOT=" + o.to, "LAYERFS_TO_ID=" + o.as}
	done, err := m.migrate(ctx, dst, id, migrateRun{
		migrateOptions: o,
		hook: func(ctx context.Context, command string) error {
			bars.done()
			return a.shell(ctx, command, env)
		},
		progress: bars.set,
	})
	bars.done()
	if err != nil {
		return err
	}
	return a.printMigrated(done)
}

func (a *app) printMigrated(m migratedJSON) error {
	switch {
	case a.json:
		return writeJSON(a.out, m)
	case a.quiet:
		return nil
	}
	var b strings.Builder
	for _, id := range m.There {
		fmt.Fprintf(&b, "%s: is there\n", id)
	}
	for _, id := range m.Copied {
		fmt.Fprintf(&b, "%s: copied\n", id)
	}
	for i, r := range m.Rounds {
		last := ""
		if i == len(m.Rounds)-1 {
			last = ", the last one"
		}
		fmt.Fprintf(&b, "%s: round %d%s: %s in %s\n", m.ID, i+1, last, humanBytes(r.Bytes), humanTime(seconds(r.Seconds)))
	}
	fmt.Fprintf(&b, "%s: frozen for %s", m.ID, humanTime(seconds(m.Frozen)))
	if m.Verified {
		fmt.Fprintf(&b, "\n%s: %s of blocks compared, the copy is the same\n%s", m.ID, humanBytes(m.Compared), m.Digest)
	}
	return a.say("%s", b.String())
}
