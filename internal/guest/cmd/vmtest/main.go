// Command vmtest runs Go tests on a distribution kernel in QEMU. See package
// guest for what it does and needs.
//
//	go run ./internal/guest/cmd/vmtest -v -run Kernel ./internal/dm
//	go run ./internal/guest/cmd/vmtest -race -require devmapper ./devmapper/...
//	go run ./internal/guest/cmd/vmtest -exec 'uname -a; thin_check -V'
//
// Standard output has what go test would print, standard error what the run
// does. The exit status is 0 if everything ran and nothing failed.
package main

import (
	"context"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"runtime"
	"strings"
	"syscall"

	"github.com/layerfs/layerfs/internal/guest"
)

func main() {
	if err := run(os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "vmtest:", err)
		os.Exit(1)
	}
}

func run(args []string) error {
	if runtime.GOOS != "linux" || runtime.GOARCH != "amd64" {
		return fmt.Errorf("needs linux/amd64, this is %s/%s", runtime.GOOS, runtime.GOARCH)
	}
	o := guest.Options{Stdout: os.Stdout, Stderr: os.Stderr}
	fs := flag.NewFlagSet("vmtest", flag.ExitOnError)
	fs.StringVar(&o.Cache, "cache", "", "`directory` for packages and modules (LAYERFS_CACHE)")
	fs.BoolVar(&o.Update, "update", false, "look for newer packages")
	fs.StringVar(&o.Kernel, "kernel", "", "`package` of the kernel (linux-image-cloud-amd64)")
	fs.StringVar(&o.Accel, "accel", "auto", "kvm, tcg or auto")
	fs.BoolVar(&o.ZFS, "zfs", false, "build and load the OpenZFS module")
	fs.IntVar(&o.Memory, "memory", 0, "`MiB` of memory (2048)")
	fs.IntVar(&o.CPUs, "cpus", 0, "`number` of CPUs (2)")
	fs.DurationVar(&o.Timeout, "timeout", 0, "`limit` for each package or command (10m)")
	fs.StringVar(&o.Append, "append", "", "`words` for the kernel's command line")
	fs.StringVar(&o.Build.Dir, "C", "", "`directory` of the module with the packages")
	fs.BoolVar(&o.Build.Race, "race", false, "with the race detector")
	fs.StringVar(&o.Build.Tags, "tags", "", "build `tags`")
	fs.StringVar(&o.Out, "out", "", "`directory` for what the guest leaves in LAYERFS_OUT")
	fs.StringVar(&o.KernelLog, "klog", "", "`file` to keep the kernel log in")
	fs.BoolVar(&o.Verbose, "v", false, "show all output")
	fs.BoolVar(&o.JSON, "json", false, "show the events of test2json")
	require := fs.String("require", os.Getenv("LAYERFS_REQUIRE"), "`backends` whose tests must not be skipped (LAYERFS_REQUIRE)")
	each := func(name, usage string, f func(string)) {
		fs.Func(name, usage, func(s string) error { f(s); return nil })
	}
	each("exec", "shell `command` to run, may be repeated", func(s string) { o.Commands = append(o.Commands, s) })
	each("program", "main `package` to have in /usr/local/bin, may be repeated", func(s string) { o.Programs = append(o.Programs, s) })
	each("env", "`NAME=value` for the guest, may be repeated", func(s string) { o.Env = append(o.Env, s) })
	each("file", "`host:guest` file or directory for the guest, may be repeated", func(s string) {
		host, to, ok := strings.Cut(s, ":")
		if !ok {
			to = host
		}
		o.Files = append(o.Files, guest.Extra{Host: host, Guest: to})
	})
	each("bench", "benchmarks to run, `regexp`; shows all output", func(s string) {
		o.TestArgs, o.Verbose = append(o.TestArgs, "-test.bench="+s), true
	})
	for _, name := range []string{"run", "skip", "benchtime", "count", "fuzz", "fuzztime", "parallel"} {
		each(name, "as in go test", func(s string) { o.TestArgs = append(o.TestArgs, "-test."+name+"="+s) })
	}
	for _, name := range []string{"short", "benchmem", "failfast"} {
		fs.BoolFunc(name, "as in go test", func(s string) error {
			o.TestArgs = append(o.TestArgs, "-test."+name+"="+s)
			return nil
		})
	}
	fs.Usage = func() {
		fmt.Fprintln(fs.Output(), "usage: vmtest [flags] [package...]")
		fs.PrintDefaults()
	}
	if err := fs.Parse(args); err != nil {
		return err
	}
	o.Packages = fs.Args()
	if len(o.Packages)+len(o.Commands) == 0 {
		fs.Usage()
		return fmt.Errorf("no package and no -exec")
	}
	if *require != "" {
		o.Env = append(o.Env, "LAYERFS_REQUIRE="+*require)
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	return guest.Run(ctx, o)
}
