package main

import (
	"context"
	"fmt"
	"io"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"time"

	"github.com/containerd/containerd/v2/core/mount"
	cdarchive "github.com/containerd/containerd/v2/pkg/archive"
	cdcompression "github.com/containerd/containerd/v2/pkg/archive/compression"
	cdoverlay "github.com/containerd/containerd/v2/plugins/snapshots/overlay"
	confs "github.com/containerd/continuity/fs"
	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"
	mobyarchive "github.com/moby/go-archive"
	graphdriver "go.podman.io/storage/drivers"
	poverlay "go.podman.io/storage/drivers/overlay"
	parchive "go.podman.io/storage/pkg/archive"
	"go.podman.io/storage/pkg/idtools"

	"github.com/layerfs/layerfs/contrib/bench/internal/timing"
)

// Names of the contestants.
const (
	containerd = "containerd"
	moby       = "moby"
	podman     = "podman"
	gnu        = "GNU"
	bare       = "bare system calls"
	unpack     = "decompression alone"
)

// external reports whether a contestant is a program of its own, whose memory
// is not this process's.
func external(who string) bool { return who == gnu }

// contestant does a job.
type contestant func(ctx context.Context, j *job) (timing.Cost, error)

// contestants returns who can do what.
func contestants() map[string]map[string]contestant {
	all := map[string]map[string]contestant{
		"apply": {
			containerd: applyContainerd,
			moby:       applyMoby,
			podman:     applyPodman,
			gnu:        applyTar,
			bare:       applyBare,
		},
		"write": {
			containerd: writeContainerd,
			moby:       writeMoby,
			podman:     writePodman,
			gnu:        writeTar,
		},
		"changes": {
			containerd: changesContainerd,
			moby:       changesMoby,
			podman:     changesPodman,
		},
		"lifecycle": {
			containerd: lifecycleContainerd,
			podman:     lifecyclePodman,
			bare:       lifecycleBare,
		},
		"copy": {
			containerd: copyContainerd,
			gnu:        copyGNU,
		},
	}
	// The goal is about this project's own parts; one peer shows where it is.
	compressed := map[string]contestant{
		containerd: applyContainerd,
		unpack:     decompress,
	}
	all["apply.gz"], all["apply.zst"] = compressed, maps.Clone(compressed)
	addOurs(all)
	return all
}

// fromFile times f on an open layer.
func fromFile(path string, f func(io.Reader) error) (timing.Cost, error) {
	src, err := os.Open(path)
	if err != nil {
		return timing.Cost{}, err
	}
	defer src.Close()
	return timing.Of(func() error { return f(src) })
}

func applyContainerd(ctx context.Context, j *job) (timing.Cost, error) {
	return fromFile(j.Tar, func(r io.Reader) error {
		stream, err := cdcompression.DecompressStream(r)
		if err != nil {
			return err
		}
		defer stream.Close()
		_, err = cdarchive.Apply(ctx, j.Dir, stream)
		return err
	})
}

func applyMoby(_ context.Context, j *job) (timing.Cost, error) {
	return fromFile(j.Tar, func(r io.Reader) error {
		_, err := mobyarchive.ApplyLayer(j.Dir, r)
		return err
	})
}

func applyPodman(_ context.Context, j *job) (timing.Cost, error) {
	return fromFile(j.Tar, func(r io.Reader) error {
		_, err := parchive.ApplyLayer(j.Dir, r)
		return err
	})
}

// tarExtract are the arguments that make GNU tar restore what the others do.
func tarExtract(path, dir string) []string {
	return []string{"--extract", "--file", path, "--directory", dir, "--same-permissions", "--numeric-owner", "--xattrs", "--xattrs-include=*"}
}

func applyTar(ctx context.Context, j *job) (timing.Cost, error) {
	return timing.Of(func() error { return command(ctx, "tar", tarExtract(j.Tar, j.Dir)...) })
}

// decompress is what no way to apply a compressed layer in one stream can beat.
func decompress(_ context.Context, j *job) (timing.Cost, error) {
	return fromFile(j.Tar, func(r io.Reader) error {
		if filepath.Ext(j.Tar) == ".gz" {
			z, err := gzip.NewReader(r)
			if err != nil {
				return err
			}
			_, err = io.Copy(io.Discard, z)
			return err
		}
		z, err := zstd.NewReader(r)
		if err != nil {
			return err
		}
		defer z.Close()
		_, err = io.Copy(io.Discard, z)
		return err
	})
}

func writeContainerd(ctx context.Context, j *job) (timing.Cost, error) {
	return timing.Of(func() error { return cdarchive.WriteDiff(ctx, io.Discard, "", j.Tree) })
}

// drain reads a stream to its end.
func drain(r io.ReadCloser, err error) error {
	if err != nil {
		return err
	}
	defer r.Close()
	_, err = io.Copy(io.Discard, r)
	return err
}

func writeMoby(_ context.Context, j *job) (timing.Cost, error) {
	return timing.Of(func() error { return drain(mobyarchive.TarWithOptions(j.Tree, &mobyarchive.TarOptions{})) })
}

func writePodman(_ context.Context, j *job) (timing.Cost, error) {
	return timing.Of(func() error { return drain(parchive.TarWithOptions(j.Tree, &parchive.TarOptions{})) })
}

// writeTar reads from a pipe: GNU tar does not read files at all when it sees
// that its output is /dev/null.
func writeTar(ctx context.Context, j *job) (timing.Cost, error) {
	return timing.Of(func() error {
		cmd := exec.CommandContext(ctx, "tar", "--create", "--file=-", "--directory", j.Tree,
			"--format=posix", "--numeric-owner", "--xattrs", "--xattrs-include=*", ".")
		out, err := cmd.StdoutPipe()
		if err != nil {
			return err
		}
		if err := cmd.Start(); err != nil {
			return err
		}
		if _, err := io.Copy(io.Discard, out); err != nil {
			return err
		}
		return cmd.Wait()
	})
}

// wantChanges checks that a peer found the change, and how many entries it
// lists beside it (such as the directories above).
func wantChanges(found bool, n int) error {
	if !found {
		return fmt.Errorf("the changed file is not among %d changes", n)
	}
	return nil
}

func changesContainerd(ctx context.Context, j *job) (timing.Cost, error) {
	n, found := 0, false
	spent, err := timing.Of(func() error {
		return confs.Changes(ctx, j.Old, j.Tree, func(_ confs.ChangeKind, path string, _ os.FileInfo, err error) error {
			n++
			found = found || filepath.Base(path) == changedFile
			return err
		})
	})
	if err != nil {
		return timing.Cost{}, err
	}
	return spent, wantChanges(found, n)
}

func changesMoby(_ context.Context, j *job) (timing.Cost, error) {
	var changes []mobyarchive.Change
	spent, err := timing.Of(func() (err error) { changes, err = mobyarchive.ChangesDirs(j.Tree, j.Old); return err })
	if err != nil {
		return timing.Cost{}, err
	}
	found := false
	for _, c := range changes {
		found = found || filepath.Base(c.Path) == changedFile
	}
	return spent, wantChanges(found, len(changes))
}

func changesPodman(_ context.Context, j *job) (timing.Cost, error) {
	var changes []parchive.Change
	spent, err := timing.Of(func() (err error) {
		changes, err = parchive.ChangesDirs(j.Tree, &idtools.IDMappings{}, j.Old, &idtools.IDMappings{})
		return err
	})
	if err != nil {
		return timing.Cost{}, err
	}
	found := false
	for _, c := range changes {
		found = found || filepath.Base(c.Path) == changedFile
	}
	return spent, wantChanges(found, len(changes))
}

func copyContainerd(ctx context.Context, j *job) (timing.Cost, error) {
	root, tree, err := copySource(ctx, j)
	if err != nil {
		return timing.Cost{}, err
	}
	return timing.Of(func() error { return confs.CopyDir(filepath.Join(root, "copy"), tree) })
}

func copyGNU(ctx context.Context, j *job) (timing.Cost, error) {
	root, tree, err := copySource(ctx, j)
	if err != nil {
		return timing.Cost{}, err
	}
	return timing.Of(func() error {
		return command(ctx, "cp", "-a", "--reflink=auto", tree, filepath.Join(root, "copy"))
	})
}

// warmUp is the number of containers before the time counts.
const warmUp = 20

// perContainer times one container's life, after some that do not count.
func perContainer(n int, life func(id string) error) (timing.Cost, error) {
	for i := range warmUp {
		if err := life(fmt.Sprintf("warm-%d", i)); err != nil {
			return timing.Cost{}, err
		}
	}
	spent, err := timing.Of(func() error {
		for i := range n {
			if err := life(fmt.Sprintf("container-%d", i)); err != nil {
				return err
			}
		}
		return nil
	})
	return timing.Cost{Wall: spent.Wall / time.Duration(n), CPU: spent.CPU / time.Duration(n)}, err
}

// fillBase gives a base layer something to show.
func fillBase(dir string) error {
	for i := range 10 {
		if err := os.WriteFile(filepath.Join(dir, fmt.Sprintf("file-%d", i)), []byte("base\n"), 0o644); err != nil {
			return err
		}
	}
	return nil
}

// checkMerged fails if a mounted layer does not show the base.
func checkMerged(dir string) error {
	_, err := os.Lstat(filepath.Join(dir, "file-0"))
	return err
}

func lifecycleContainerd(ctx context.Context, j *job) (timing.Cost, error) {
	root, err := workRoot(ctx, j)
	if err != nil {
		return timing.Cost{}, err
	}
	sn, err := cdoverlay.NewSnapshotter(filepath.Join(root, "snapshotter"))
	if err != nil {
		return timing.Cost{}, err
	}
	defer sn.Close()
	mounts, err := sn.Prepare(ctx, "base-active", "")
	if err != nil {
		return timing.Cost{}, err
	}
	if err := fillBase(mounts[0].Source); err != nil { // a bind mount of the layer itself
		return timing.Cost{}, err
	}
	if err := sn.Commit(ctx, "base", "base-active"); err != nil {
		return timing.Cost{}, err
	}
	return perContainer(j.N, func(id string) error {
		mounts, err := sn.Prepare(ctx, id, "base")
		if err != nil {
			return err
		}
		target := filepath.Join(root, id)
		if err := os.Mkdir(target, 0o755); err != nil {
			return err
		}
		if err := mount.All(mounts, target); err != nil {
			return err
		}
		if err := checkMerged(target); err != nil {
			return err
		}
		if err := mount.UnmountAll(target, 0); err != nil {
			return err
		}
		if err := os.Remove(target); err != nil {
			return err
		}
		return sn.Remove(ctx, id)
	})
}

func lifecyclePodman(ctx context.Context, j *job) (timing.Cost, error) {
	root, err := workRoot(ctx, j)
	if err != nil {
		return timing.Cost{}, err
	}
	d, err := poverlay.Init(filepath.Join(root, "overlay"), graphdriver.Options{Root: root, RunRoot: filepath.Join(root, "run")})
	if err != nil {
		return timing.Cost{}, err
	}
	defer func() { _ = d.Cleanup() }()
	if err := d.Create("base", "", nil); err != nil {
		return timing.Cost{}, err
	}
	if err := fillBase(filepath.Join(root, "overlay", "base", "diff")); err != nil {
		return timing.Cost{}, err
	}
	return perContainer(j.N, func(id string) error {
		if err := d.CreateReadWrite(id, "base", nil); err != nil {
			return err
		}
		dir, err := d.Get(id, graphdriver.MountOpts{})
		if err != nil {
			return err
		}
		if err := checkMerged(dir); err != nil {
			return err
		}
		if err := d.Put(id); err != nil {
			return err
		}
		return d.Remove(id)
	})
}
