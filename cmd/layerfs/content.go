package main

import (
	"bufio"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"hash"
	"io"
	"math/rand/v2"
	"os"
	"strconv"
	"time"

	"github.com/urfave/cli/v3"

	"github.com/layerfs/layerfs"
	"github.com/layerfs/layerfs/internal/transfer"
)

// applyFlags are the flags of commands that read a stream.
func applyFlags() []cli.Flag {
	return []cli.Flag{
		&cli.StringFlag{Name: "devices", Value: "make", Usage: "device nodes: make, skip, record (as containers/storage does) or refuse"},
		&cli.BoolFlag{Name: "ignore-owners", Usage: "all files belong to you"},
		&cli.StringSliceFlag{Name: "uid-map", Usage: "`CONTAINER:HOST:SIZE` of user ids; may be repeated"},
		&cli.StringSliceFlag{Name: "gid-map", Usage: "`CONTAINER:HOST:SIZE` of group ids; may be repeated"},
		&cli.StringFlag{Name: "max-bytes", Usage: "refuse more `BYTES` of content, such as 10G"},
		&cli.Int64Flag{Name: "max-entries", Usage: "refuse more than this `NUMBER` of files"},
		&cli.Int64Flag{Name: "max-ratio", Usage: "refuse a compression of more than `N` to 1 (default 1100)"},
	}
}

func applyOptions(cmd *cli.Command) (*layerfs.ApplyOptions, error) {
	o := &layerfs.ApplyOptions{
		IgnoreOwners: cmd.Bool("ignore-owners"),
		Limits:       layerfs.Limits{Entries: cmd.Int64("max-entries"), Ratio: cmd.Int64("max-ratio")},
	}
	var err error
	if o.Devices, err = devicePolicy(cmd.String("devices")); err != nil {
		return nil, err
	}
	if s := cmd.String("max-bytes"); s != "" {
		if o.Limits.Bytes, err = parseSize(s); err != nil {
			return nil, err
		}
	}
	o.IDMap, err = idMap(cmd)
	return o, err
}

func devicePolicy(s string) (layerfs.DevicePolicy, error) {
	switch s {
	case "make":
		return layerfs.DevicesMake, nil
	case "skip":
		return layerfs.DevicesSkip, nil
	case "record":
		return layerfs.DevicesRecord, nil
	case "refuse":
		return layerfs.DevicesRefuse, nil
	}
	return 0, usagef("devices %q is not one of make, skip, record, refuse", s)
}

// idMap reads --uid-map and --gid-map; nil if there are none.
func idMap(cmd *cli.Command) (*layerfs.IDMap, error) {
	uids, err := idRanges(cmd.StringSlice("uid-map"))
	if err != nil {
		return nil, err
	}
	gids, err := idRanges(cmd.StringSlice("gid-map"))
	if err != nil {
		return nil, err
	}
	switch {
	case uids == nil && gids == nil:
		return nil, nil
	case uids == nil || gids == nil:
		return nil, usagef("--uid-map and --gid-map go together")
	}
	return &layerfs.IDMap{UIDs: uids, GIDs: gids}, nil
}

func idRanges(list []string) (ranges []layerfs.IDRange, err error) {
	for _, s := range list {
		var r layerfs.IDRange
		var rest string
		n, _ := fmt.Sscanf(s, "%d:%d:%d%s", &r.ContainerID, &r.HostID, &r.Size, &rest)
		if n != 3 || r.Size == 0 {
			return nil, usagef("%q is not CONTAINER:HOST:SIZE", s)
		}
		ranges = append(ranges, r)
	}
	return ranges, nil
}

// source opens what a layer is to be filled with: a directory, a file or, as
// "-", standard input. total is its size, 0 if unknown.
func (a *app) source(name string) (src transfer.Source, total int64, closeSource func() error, err error) {
	none := func() error { return nil }
	if name == "-" || name == "" {
		if isTerminal(a.in) {
			return nil, 0, nil, usagef("standard input is a terminal: name a file, or give the stream with | or <")
		}
		return interruptible(a.in), 0, none, nil
	}
	f, err := os.Open(name)
	if err != nil {
		return nil, 0, nil, err
	}
	fi, err := f.Stat()
	if err != nil {
		return nil, 0, nil, errors.Join(err, f.Close())
	}
	if fi.IsDir() {
		return transfer.Tree(name), 0, none, f.Close()
	}
	if !fi.Mode().IsRegular() {
		return interruptible(f), 0, f.Close, nil
	}
	return transfer.Stream(f), fi.Size(), f.Close, nil
}

// interruptible is a stream that may be silent for ever, such as a terminal's
// or a pipe's: what waits for it must end with the context all the same. The
// goroutine that reads ends with the stream.
func interruptible(in io.Reader) transfer.Source {
	return func(ctx context.Context) (io.ReadCloser, error) {
		r, w := io.Pipe()
		stop := context.AfterFunc(ctx, func() { w.CloseWithError(context.Cause(ctx)) })
		go func() {
			const large = 1 << 20 // each buffer is a change of goroutines
			_, err := io.CopyBuffer(struct{ io.Writer }{w}, struct{ io.Reader }{in}, make([]byte, large))
			w.CloseWithError(err)
			stop()
		}()
		return r, nil
	}
}

// reading wraps a source and the options of its Apply so that a bar shows how
// far it is: by the bytes of the source where their number is known.
func reading(bar *meter, src transfer.Source, total int64, opts *layerfs.ApplyOptions) transfer.Source {
	if total == 0 {
		opts.Progress = bar.set
		return src
	}
	return func(ctx context.Context) (io.ReadCloser, error) {
		r, err := src(ctx)
		if err != nil {
			return nil, err
		}
		return struct {
			io.Reader
			io.Closer
		}{bar.reader(r), r}, nil
	}
}

func (a *app) importCommand() *cli.Command {
	return &cli.Command{
		Name: "import", Usage: "make a layer of a directory or a tar stream", ArgsUsage: "ID DIR|TAR|-", Category: "content",
		Description: "Makes a base layer, or one on --parent, and fills it. If that fails, no layer is left.\nThe stream may be compressed (gzip, zstd, bzip2, xz).",
		Flags: append(append(createFlags(), applyFlags()...),
			&cli.StringFlag{Name: "parent", Usage: "make the layer on top of `ID`"}),
		Action: func(ctx context.Context, cmd *cli.Command) error {
			arg, err := args(cmd, 2, 2)
			if err != nil {
				return err
			}
			create, err := createOptions(cmd)
			if err != nil {
				return err
			}
			apply, err := applyOptions(cmd)
			if err != nil {
				return err
			}
			if err := layerfs.CheckID(arg[0]); err != nil {
				return err
			}
			src, total, closeSource, err := a.source(arg[1])
			if err != nil {
				return err
			}
			defer closeSource()
			bar := a.meter("import "+arg[0], total)
			defer bar.done()
			d, err := a.open()
			return with(d, err, func(d layerfs.Driver) error {
				res, err := transfer.Import(ctx, d, arg[0], cmd.String("parent"), reading(bar, src, total, apply), create, apply)
				bar.done()
				if err != nil {
					return err
				}
				return a.applied(arg[0], res)
			})
		},
	}
}

func (a *app) apply() *cli.Command {
	return &cli.Command{
		Name: "apply", Usage: "add a tar stream to a layer", ArgsUsage: "ID [TAR|DIR|-]", Category: "content",
		Description: "The stream is a layer as in the OCI image specification, compressed or not.\nThe layer must be neither mounted nor frozen. If it fails half-way, the layer may be incomplete, which show tells.",
		Flags:       applyFlags(),
		Action: func(ctx context.Context, cmd *cli.Command) error {
			arg, err := args(cmd, 1, 2)
			if err != nil {
				return err
			}
			opts, err := applyOptions(cmd)
			if err != nil {
				return err
			}
			src, total, closeSource, err := a.source(arg[1])
			if err != nil {
				return err
			}
			defer closeSource()
			bar := a.meter("apply "+arg[0], total)
			defer bar.done()
			d, err := a.existing()
			return with(d, err, func(d layerfs.Driver) error {
				r, err := reading(bar, src, total, opts)(ctx)
				if err != nil {
					return err
				}
				res, err := d.Apply(ctx, arg[0], r, opts)
				bar.done()
				if err := errors.Join(err, r.Close()); err != nil {
					return err
				}
				return a.applied(arg[0], res)
			})
		},
	}
}

// applied prints what an Apply has read.
func (a *app) applied(id string, r layerfs.ApplyResult) error {
	switch {
	case a.json:
		return writeJSON(a.out, newAppliedJSON(id, r))
	case a.quiet:
		return nil
	}
	if err := a.say("%s: %s, %s of content", id, entries(r.Entries), humanBytes(r.Bytes)); err != nil {
		return err
	}
	if r.Skipped > 0 {
		if err := a.say("%d device nodes were left out", r.Skipped); err != nil {
			return err
		}
	}
	return a.say("%s", r.Digest)
}

// baseFlags tell diff and changes what to compare with.
func baseFlags() []cli.Flag {
	return []cli.Flag{
		&cli.StringFlag{Name: "base", Usage: "compare with this ancestor `ID` instead of the parent"},
		&cli.BoolFlag{Name: "whole", Usage: "the whole tree, and not what differs from another"},
	}
}

// base returns what to compare a layer with.
func base(ctx context.Context, cmd *cli.Command, d layerfs.Driver, id string) (string, error) {
	if cmd.Bool("whole") {
		return "", nil
	}
	if b := cmd.String("base"); b != "" {
		return b, nil
	}
	info, err := d.Stat(ctx, id, nil)
	return info.Parent, err
}

func checkBase(cmd *cli.Command) error {
	if cmd.Bool("whole") && cmd.String("base") != "" {
		return usagef("--base and --whole exclude each other")
	}
	return nil
}

func (a *app) changes() *cli.Command {
	return &cli.Command{
		Name: "changes", Usage: "list what a layer changes", ArgsUsage: "ID", Category: "content",
		Description: "Prints a line for each path that was added (A), changed (C) or deleted (D) against the parent.",
		Flags:       baseFlags(),
		Action: func(ctx context.Context, cmd *cli.Command) error {
			arg, err := args(cmd, 1, 1)
			if err != nil {
				return err
			}
			if err := checkBase(cmd); err != nil {
				return err
			}
			d, err := a.existing()
			return with(d, err, func(d layerfs.Driver) error {
				on, err := base(ctx, cmd, d, arg[0])
				if err != nil {
					return err
				}
				return a.printChanges(ctx, d, arg[0], on)
			})
		},
	}
}

func (a *app) printChanges(ctx context.Context, d layerfs.Driver, id, base string) error {
	w := bufio.NewWriter(a.out)
	for c, err := range d.Changes(ctx, id, base) {
		if err == nil {
			if a.json {
				err = writeJSON(w, newChangeJSON(c))
			} else {
				_, err = fmt.Fprintf(w, "%s %s\n", c.Kind, printablePath(c.Path))
			}
		}
		if err != nil {
			return errors.Join(err, w.Flush())
		}
	}
	return w.Flush()
}

func (a *app) diff() *cli.Command {
	return &cli.Command{
		Name: "diff", Usage: "write what a layer changes as a tar stream", ArgsUsage: "ID", Category: "content",
		Description: "The stream is a layer as in the OCI image specification: apply makes the same changes elsewhere.",
		Flags: append(baseFlags(),
			&cli.StringFlag{Name: "output", Aliases: []string{"o"}, Value: "-", Usage: "`FILE` to write, whole or not at all; - is standard output"},
			&cli.StringFlag{Name: "profile", Value: "full", Usage: "full (all that tar can hold), oci (what registries expect) or reproducible"},
			&cli.StringFlag{Name: "compression", Value: "none", Usage: "none, gzip or zstd"},
			&cli.IntFlag{Name: "level", Usage: "of the compression; 0 is its default"},
			&cli.StringFlag{Name: "source-date", Sources: cli.EnvVars("SOURCE_DATE_EPOCH"), Usage: "with --profile reproducible, no time is later than `TIME`, in seconds since 1970 or as 2006-01-02T15:04:05Z"},
			&cli.StringSliceFlag{Name: "uid-map", Usage: "`CONTAINER:HOST:SIZE`: the stream has the container's user ids; may be repeated"},
			&cli.StringSliceFlag{Name: "gid-map", Usage: "the same for group ids"},
		),
		Action: func(ctx context.Context, cmd *cli.Command) error {
			arg, err := args(cmd, 1, 1)
			if err != nil {
				return err
			}
			if err := checkBase(cmd); err != nil {
				return err
			}
			opts, err := diffOptions(cmd)
			if err != nil {
				return err
			}
			name := cmd.String("output")
			switch {
			case name == "-" && isTerminal(a.out):
				return usagef("a tar stream does not belong on a terminal: name a file with -o, or use | or >")
			case name == "-" && a.json:
				return usagef("--json needs -o FILE, as the stream takes standard output")
			}
			d, err := a.existing()
			return with(d, err, func(d layerfs.Driver) error {
				on, err := base(ctx, cmd, d, arg[0])
				if err != nil {
					return err
				}
				return a.writeDiff(ctx, d, arg[0], on, name, opts)
			})
		},
	}
}

func diffOptions(cmd *cli.Command) (*layerfs.DiffOptions, error) {
	o := &layerfs.DiffOptions{Level: cmd.Int("level")}
	switch p := cmd.String("profile"); p {
	case "full":
		o.Profile = layerfs.ProfileFull
	case "oci":
		o.Profile = layerfs.ProfileOCI
	case "reproducible":
		o.Profile = layerfs.ProfileReproducible
	default:
		return nil, usagef("profile %q is not one of full, oci, reproducible", p)
	}
	switch c := cmd.String("compression"); c {
	case "none":
		o.Compression = layerfs.NoCompression
	case "gzip":
		o.Compression = layerfs.Gzip
	case "zstd":
		o.Compression = layerfs.Zstd
	default:
		return nil, usagef("compression %q is not one of none, gzip, zstd", c)
	}
	if s := cmd.String("source-date"); s != "" && o.Profile == layerfs.ProfileReproducible {
		date, err := parseDate(s)
		if err != nil {
			return nil, err
		}
		o.SourceDate = date
	}
	var err error
	o.IDMap, err = idMap(cmd)
	return o, err
}

func parseDate(s string) (time.Time, error) {
	if n, err := strconv.ParseInt(s, 10, 64); err == nil {
		return time.Unix(n, 0).UTC(), nil
	}
	t, err := time.Parse(time.RFC3339, s)
	if err != nil {
		return t, usagef("%q is neither seconds since 1970 nor a time such as 2006-01-02T15:04:05Z", s)
	}
	return t, nil
}

// writeDiff writes the stream of a layer to a file, which appears whole or not
// at all, or to standard output.
func (a *app) writeDiff(ctx context.Context, d layerfs.Driver, id, base, name string, opts *layerfs.DiffOptions) error {
	bar := a.meter("diff "+id, 0)
	defer bar.done()
	r, err := d.Diff(ctx, id, base, opts)
	if err != nil {
		return err
	}
	defer r.Close()
	if name == "-" {
		_, err := io.Copy(bar.writer(a.out), r)
		return errors.Join(err, r.Close())
	}
	sum := &summed{hash: sha256.New()}
	err = writeWhole(name, func(w io.Writer) error {
		_, err := io.Copy(io.MultiWriter(bar.writer(w), sum), r)
		return err
	})
	bar.done()
	if err = errors.Join(err, r.Close()); err != nil {
		return err
	}
	digest := "sha256:" + hex.EncodeToString(sum.hash.Sum(nil))
	switch {
	case a.json:
		return writeJSON(a.out, diffJSON{ID: id, Base: base, File: name, Bytes: sum.n, Digest: digest, Compression: opts.Compression.String()})
	case a.quiet:
		return nil
	}
	return a.say("%s: %s\n%s", name, humanBytes(sum.n), digest)
}

// summed counts and hashes.
type summed struct {
	hash hash.Hash
	n    int64
}

func (s *summed) Write(p []byte) (int, error) {
	s.n += int64(len(p))
	return s.hash.Write(p)
}

// writeWhole writes a file beside its place and moves it there at the end.
// What is there and is no regular file, such as a pipe, is written itself.
func writeWhole(name string, write func(io.Writer) error) error {
	if fi, err := os.Stat(name); err == nil && !fi.Mode().IsRegular() {
		f, err := os.OpenFile(name, os.O_WRONLY, 0)
		if err != nil {
			return err
		}
		return errors.Join(write(f), f.Close())
	}
	temp := fmt.Sprintf("%s.%08x.part", name, rand.Uint32())
	f, err := os.OpenFile(temp, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o666)
	if err != nil {
		return err
	}
	err = errors.Join(write(f), f.Close())
	if err == nil {
		err = os.Rename(temp, name)
	}
	if err != nil {
		return errors.Join(err, os.Remove(temp))
	}
	return nil
}
