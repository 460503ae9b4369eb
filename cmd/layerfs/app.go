package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"runtime/debug"
	"strings"

	"github.com/urfave/cli/v3"

	"github.com/layerfs/layerfs"
	"github.com/layerfs/layerfs/aufs"
	"github.com/layerfs/layerfs/auto"
)

// app is one run of the command.
type app struct {
	in       io.Reader
	out, err io.Writer

	// The flags of every command.
	root, driver, durability string
	opts                     []string
	json, quiet, verbose     bool
}

// run executes a command line and returns the exit status. args[0] is the name
// of the program. Nothing half-made is left when ctx is cancelled.
func run(ctx context.Context, args []string, stdin io.Reader, stdout, stderr io.Writer) int {
	a := &app{in: stdin, out: stdout, err: stderr}
	err := a.command().Run(ctx, args)
	if err != nil && ctx.Err() != nil && !errors.Is(err, context.Canceled) {
		// What was interrupted may have said so in its own way.
		err = fmt.Errorf("%w: %w", context.Canceled, err)
	}
	return a.report(err)
}

// command is the whole command line.
func (a *app) command() *cli.Command {
	root := &cli.Command{
		Name:        "layerfs",
		Usage:       "layers that look like one directory tree",
		Version:     version(),
		Description: description(),
		Writer:      a.out,
		ErrWriter:   a.err,
		// The library would end the process.
		ExitErrHandler:            func(context.Context, *cli.Command, error) {},
		DisableSliceFlagSeparator: true, // mount options have commas
		Flags: []cli.Flag{
			&cli.StringFlag{Name: "root", Usage: "`DIR` of the layers", Sources: cli.EnvVars("LAYERFS_ROOT"), Value: defaultRoot(), Destination: &a.root},
			&cli.StringFlag{Name: "driver", Usage: "`NAME` of the driver (" + strings.Join(auto.Drivers(), ", ") + "); default: the one that has layers there, or the best", Sources: cli.EnvVars("LAYERFS_DRIVER"), Destination: &a.driver},
			&cli.StringFlag{Name: "durability", Usage: "what is on disk when the command ends: none, metadata or full", Value: "metadata", Destination: &a.durability},
			&cli.StringSliceFlag{Name: "opt", Usage: "`DRIVER.KEY=VALUE`, an option of a driver; may be repeated", Destination: &a.opts},
			&cli.BoolFlag{Name: "json", Usage: "results as JSON, one object a line", Destination: &a.json},
			&cli.BoolFlag{Name: "quiet", Aliases: []string{"q"}, Usage: "no progress, and only what was asked for", Destination: &a.quiet},
			&cli.BoolFlag{Name: "verbose", Usage: "say what is done behind the scenes", Destination: &a.verbose},
		},
		Commands: []*cli.Command{
			a.create(), a.apply(), a.importCommand(),
			a.mount(), a.umount(),
			a.diff(), a.changes(), a.copy(), a.send(), a.receive(), a.migrate(), a.rm(),
			a.ls(), a.show(), a.status(), a.probe(), a.check(),
			a.demo(),
		},
		Action: func(_ context.Context, cmd *cli.Command) error {
			if name := cmd.Args().First(); name != "" {
				return usagef("%q is no command", name)
			}
			return cli.ShowRootCommandHelp(cmd)
		},
	}
	bad := func(_ context.Context, _ *cli.Command, err error, _ bool) error { return usageError{err} }
	root.OnUsageError = bad
	for _, c := range root.Commands {
		c.OnUsageError = bad
		c.HideHelpCommand = true // "help" may be a layer
	}
	return root
}

func description() string {
	var b strings.Builder
	b.WriteString("Options of drivers for --opt:\n")
	for _, o := range driverOptions() {
		fmt.Fprintf(&b, "\n  %-26s %s", o.driver+"."+o.key, o.usage)
	}
	return b.String()
}

func version() string {
	info, ok := debug.ReadBuildInfo()
	if !ok || info.Main.Version == "" {
		return "unknown"
	}
	return info.Main.Version
}

// defaultRoot is the host's place for state, or the user's.
func defaultRoot() string {
	if os.Geteuid() == 0 {
		return "/var/lib/layerfs"
	}
	if dir := os.Getenv("XDG_DATA_HOME"); filepath.IsAbs(dir) {
		return filepath.Join(dir, "layerfs")
	}
	home, err := os.UserHomeDir()
	if err != nil {
		return ""
	}
	return filepath.Join(home, ".local", "share", "layerfs")
}

// args checks the number of arguments and returns them, and empty strings for
// those that may be left out.
func args(cmd *cli.Command, least, most int) ([]string, error) {
	n := cmd.NArg()
	switch {
	case n < least:
		return nil, usagef("%s needs %s", cmd.Name, cmd.ArgsUsage)
	case n > most:
		return nil, usagef("%s takes %s, and not %q", cmd.Name, cmd.ArgsUsage, cmd.Args().Get(most))
	}
	list := make([]string, most)
	copy(list, cmd.Args().Slice())
	return list, nil
}

// errNoRoot says that there is nothing where layers should be.
var errNoRoot = errors.New("there are no layers, as the directory does not exist")

// place is where layers are and how they are kept.
type place struct {
	root, driver string
	opts         []string
}

func (a *app) place() place { return place{a.root, a.driver, a.opts} }

// open opens the driver of --root, which is made if it is new.
func (a *app) open() (layerfs.Driver, error) { return a.openAt(a.place()) }

// existing opens the driver of --root, but does not make a root: a typing
// mistake should not.
func (a *app) existing() (layerfs.Driver, error) {
	if a.root != "" {
		if _, err := os.Stat(a.root); errors.Is(err, fs.ErrNotExist) {
			return nil, fmt.Errorf("%s: %w", a.root, errNoRoot)
		}
	}
	return a.open()
}

func (a *app) openAt(p place) (layerfs.Driver, error) {
	if p.root == "" {
		return nil, usagef("no root: give --root or LAYERFS_ROOT")
	}
	opts, err := a.options(p)
	if err != nil {
		return nil, err
	}
	d, err := auto.Open(p.root, opts)
	if err != nil {
		return nil, err
	}
	if err := applicable(p.opts, d.Name()); err != nil {
		return nil, errors.Join(err, d.Close())
	}
	return d, nil
}

// options turns flags into options, all checked.
func (a *app) options(p place) (*auto.Options, error) {
	durability, err := layerfs.ParseDurability(a.durability)
	if err != nil {
		return nil, usageError{err}
	}
	opts := &auto.Options{Driver: p.driver, Durability: durability}
	if a.verbose {
		opts.Logger = slog.New(slog.NewTextHandler(a.err, &slog.HandlerOptions{Level: slog.LevelDebug}))
	}
	if p.driver != "" {
		if opts.Driver, err = knownDriver(p.driver); err != nil {
			return nil, err
		}
		if err := applicable(p.opts, opts.Driver); err != nil {
			return nil, err
		}
	}
	if err := setDriverOptions(opts, p.opts); err != nil {
		return nil, err
	}
	if opts.AUFS == nil {
		opts.AUFS = new(aufs.Options)
	}
	if len(opts.AUFS.Helper) == 0 && !opts.AUFS.InProcess {
		opts.AUFS.Helper = []string{"/proc/self/exe"} // this program: see main
	}
	return opts, nil
}

// with runs something with an open driver.
func with(d layerfs.Driver, err error, do func(layerfs.Driver) error) error {
	if err != nil {
		return err
	}
	return errors.Join(do(d), d.Close())
}
