package zfs

import (
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"strings"

	"github.com/layerfs/layerfs"
)

// maxName is the length of the longest name of a dataset or snapshot:
// ZFS_MAX_DATASET_NAME_LEN, which counts the NUL, sys/fs/zfs.h.
const maxName = 255

// checkDataset reports why a string cannot name a file system. The rules are
// those of dataset_nvlcheck, module/zcommon/zfs_namecheck.c; in addition a name
// that zfs could take for an option is refused.
func checkDataset(name string) error {
	if len(name) > maxName {
		return fmt.Errorf("dataset name of %d bytes, more than %d", len(name), maxName)
	}
	for part := range strings.SplitSeq(name, "/") {
		switch part {
		case "":
			return fmt.Errorf("dataset %q has an empty component", name)
		case ".", "..":
			return fmt.Errorf("dataset %q has the component %q", name, part)
		}
	}
	if c := name[0]; !('a' <= c && c <= 'z' || 'A' <= c && c <= 'Z') {
		return fmt.Errorf("dataset %q does not begin with a letter", name)
	}
	for i := range len(name) {
		c := name[i]
		if !('a' <= c && c <= 'z' || 'A' <= c && c <= 'Z' || '0' <= c && c <= '9' || strings.IndexByte("-_.: /", c) >= 0) {
			return fmt.Errorf("dataset %q has %q at byte %d", name, c, i)
		}
	}
	return nil
}

// poolOf returns the pool of a dataset.
func poolOf(dataset string) string {
	pool, _, _ := strings.Cut(dataset, "/")
	return pool
}

// splitSnapshot splits DATASET@NAME.
func splitSnapshot(s string) (dataset, name string, ok bool) { return strings.Cut(s, "@") }

// snapshotPrefix is what the names of all snapshots of this package begin with.
const snapshotPrefix = "layerfs-"

// snapshotLength is the length of the longest name of one, that of newSnapshot:
// the prefix, a hash of six bytes, "-" and random.
const snapshotLength = len(snapshotPrefix) + 2*6 + len("-") + 8

// maxParent is the length of the longest parent dataset that leaves room for a
// layer with the longest id and a snapshot of it.
const maxParent = maxName - len("/") - layerfs.MaxIDLength - len("@") - snapshotLength

// checkParent reports why a dataset cannot be the parent of all layers there can
// be.
func checkParent(name string) error {
	if len(name) > maxParent {
		return fmt.Errorf("dataset %s has %d bytes, more than %d: the names of a layer with the longest id and of its snapshot would not fit in %d",
			name, len(name), maxParent, maxName)
	}
	return nil
}

// snapshotsFor is what the names of the snapshots begin with that were taken to
// make a layer. A hash, because an id may take up most of the name.
func snapshotsFor(id string) string {
	sum := sha256.Sum256([]byte(id))
	return snapshotPrefix + hex.EncodeToString(sum[:6]) + "-"
}

// newSnapshot returns the full name of a snapshot of dataset that does not
// exist, for making layer id.
func newSnapshot(dataset, id string) (string, error) {
	name := dataset + "@" + snapshotsFor(id) + random()
	if len(name) > maxName {
		return "", fmt.Errorf("snapshot name %s has %d bytes, more than %d", name, len(name), maxName)
	}
	return name, nil
}

// random returns eight letters that nobody else has.
func random() string {
	var b [4]byte
	rand.Read(b[:]) // never fails, crypto/rand, Go 1.24
	return hex.EncodeToString(b[:])
}

// propLayer is the user property that marks a layer's dataset. Its value is
// the mark of the root, ":" and the layer's id.
const propLayer = "org.layerfs:layer"

func markOf(root, id string) string { return root + ":" + id }

// table parses the output of zfs list -H or zfs get -H: lines of columns that
// are separated by tabs.
func table(out []byte, columns int) ([][]string, error) {
	var rows [][]string
	for line := range strings.Lines(string(out)) {
		row := strings.Split(strings.TrimSuffix(line, "\n"), "\t")
		if len(row) != columns {
			return nil, fmt.Errorf("zfs printed %q, want %d columns", line, columns)
		}
		rows = append(rows, row)
	}
	return rows, nil
}

// marked returns the ids of the layers of a root from the rows (name, mark) of
// the datasets below parent.
func marked(rows [][]string, parent, root string) []string {
	var ids []string
	for _, row := range rows {
		id, ok := strings.CutPrefix(row[0], parent+"/")
		if ok && row[1] == markOf(root, id) {
			ids = append(ids, id)
		}
	}
	return ids
}

var errForeign = errors.New("the dataset is not a layer of this root")
