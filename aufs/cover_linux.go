package aufs

import (
	"context"
	"errors"
	"os"

	"golang.org/x/sys/unix"

	"github.com/layerfs/layerfs/internal/merged"
	"github.com/layerfs/layerfs/whiteout"
)

// cover makes those directories of a new branch opaque that stand for
// something other than a directory in the tree below: AUFS, unlike overlayfs,
// passes over what is no directory, and would merge them with a directory that
// this hides further down. Cost grows with the directories that the branch and
// the tree below have in common.
func cover(ctx context.Context, branch string, lowers []string) error {
	if len(lowers) < 2 {
		return nil
	}
	m, err := merged.Open(rules{}, lowers)
	if err != nil {
		return err
	}
	defer m.Close()
	below, err := m.Root(0)
	if err != nil {
		return err
	}
	root, err := os.OpenFile(branch, unix.O_DIRECTORY|unix.O_NOFOLLOW, 0)
	if err != nil {
		return err
	}
	defer root.Close()
	return coverDir(ctx, m, root, below.Places)
}

func coverDir(ctx context.Context, m *merged.Tree, dir *os.File, below []merged.Place) error {
	if err := context.Cause(ctx); err != nil {
		return err
	}
	opaque, err := exists(dir, whiteout.OpaqueName)
	if err != nil || opaque {
		return err
	}
	names, err := subdirs(dir)
	if err != nil || len(names) == 0 {
		return err
	}
	nodes, err := lookupAll(m, below, names)
	if err != nil {
		return err
	}
	for i, name := range names {
		if nodes[i] == nil {
			continue
		}
		if err := coverOne(ctx, m, dir, name, nodes[i]); err != nil {
			return err
		}
	}
	return nil
}

func coverOne(ctx context.Context, m *merged.Tree, parent *os.File, name string, below *merged.Node) error {
	dir, err := merged.OpenAt(parent, name, unix.O_RDONLY|unix.O_DIRECTORY)
	if err != nil {
		return err
	}
	defer dir.Close()
	if below.IsDir() {
		return coverDir(ctx, m, dir, below.Places)
	}
	return keepTimes(procPath(dir)+"/.", func() error { return whiteout.SetOpaque(dir, whiteout.AUFS) })
}

// subdirs lists the directories in a directory of a branch.
func subdirs(dir *os.File) ([]string, error) {
	entries, err := dir.ReadDir(-1)
	if err != nil {
		return nil, err
	}
	var names []string
	for _, e := range entries {
		if e.IsDir() && !whiteout.IsReserved(e.Name()) {
			names = append(names, e.Name())
		}
	}
	return names, nil
}

// lookupAll finds names in a merged directory.
func lookupAll(m *merged.Tree, places []merged.Place, names []string) (nodes []*merged.Node, err error) {
	d, err := m.Dir(places)
	if err != nil {
		return nil, err
	}
	defer d.Close()
	for _, name := range names {
		n, err := d.Lookup(name)
		if err != nil && !errors.Is(err, unix.ENAMETOOLONG) {
			return nil, err
		}
		nodes = append(nodes, n)
	}
	return nodes, nil
}
