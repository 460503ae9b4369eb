package thin

import (
	"encoding/binary"
	"encoding/xml"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/layerfs/layerfs/internal/testenv"
)

// image is metadata that a test builds, with trees that share nodes as the
// kernel's do. It is an io.ReaderAt.
type image struct {
	data   []byte
	fanout int
}

func (im *image) ReadAt(p []byte, off int64) (int, error) {
	if off >= int64(len(im.data)) {
		return 0, fmt.Errorf("read at %d", off)
	}
	return copy(p, im.data[off:]), nil
}

func (im *image) block(n uint64) []byte { return im.data[n*BlockSize : (n+1)*BlockSize] }

// seal makes the checksum and the block number right.
func (im *image) seal(n uint64, xor uint32) {
	b := im.block(n)
	binary.LittleEndian.PutUint64(b[8:], n)
	binary.LittleEndian.PutUint32(b, checksum(b, xor))
}

func (im *image) alloc() uint64 {
	im.data = append(im.data, make([]byte, BlockSize)...)
	return uint64(len(im.data)/BlockSize - 1)
}

type item struct {
	key   uint64
	value []byte
}

func u64bytes(v uint64) []byte { return binary.LittleEndian.AppendUint64(nil, v) }

// write puts a node into a new block.
func (im *image) write(leaf bool, valueSize int, items []item) uint64 {
	n := im.alloc()
	b := im.block(n)
	most := (BlockSize - nodeHead) / (8 + valueSize) / 3 * 3 // as the kernel rounds
	flags := uint32(internalNode)
	if leaf {
		flags = leafNode
	}
	binary.LittleEndian.PutUint32(b[4:], flags)
	binary.LittleEndian.PutUint32(b[16:], uint32(len(items)))
	binary.LittleEndian.PutUint32(b[20:], uint32(most))
	binary.LittleEndian.PutUint32(b[24:], uint32(valueSize))
	for i, it := range items {
		binary.LittleEndian.PutUint64(b[nodeHead+8*i:], it.key)
		copy(b[nodeHead+8*most+valueSize*i:], it.value)
	}
	im.seal(n, nodeXOR)
	return n
}

// tree writes a tree.
func (im *image) tree(valueSize int, items []item) uint64 {
	level, leaf := items, true
	for {
		if len(level) <= im.fanout {
			return im.write(leaf, valueSize, level)
		}
		var up []item
		for part := range slices.Chunk(level, im.fanout) {
			up = append(up, item{part[0].key, u64bytes(im.write(leaf, valueSize, part))})
		}
		level, leaf, valueSize = up, false, 8
	}
}

// change returns the root of a copy of the tree in which the key has the
// value; nil removes it. Nodes that do not change are shared. A node is never
// split or merged, and its last entry stays.
func (im *image) change(root, key uint64, value []byte) uint64 {
	m := &Metadata{r: im}
	n, err := m.node(root, 8, 0, 1<<64-1)
	if err != nil {
		panic(err)
	}
	var items []item
	for i := range n.n {
		items = append(items, item{n.key(i), slices.Clone(n.value(i))})
	}
	i := max(n.find(key), 0)
	exact := n.n > 0 && n.key(i) == key
	switch {
	case !n.leaf:
		items[i].value = u64bytes(im.change(n.child(i), key, value))
		items[i].key = min(items[i].key, key)
	case value == nil && exact && n.n > 1:
		items = slices.Delete(items, i, i+1)
	case value != nil && exact:
		items[i].value = value
	case value != nil && n.n < n.max:
		at, _ := slices.BinarySearchFunc(items, key, func(it item, k uint64) int {
			if it.key < k {
				return -1
			}
			return 1
		})
		items = slices.Insert(items, at, item{key, value})
	default:
		return root
	}
	return im.write(n.leaf, 8, items)
}

// finish writes the trees of devices and points the superblock at them.
func (im *image) finish(roots map[uint32]uint64) {
	var maps_, details []item
	for _, id := range slices.Sorted(maps.Keys(roots)) {
		maps_ = append(maps_, item{uint64(id), u64bytes(roots[id])})
		details = append(details, item{uint64(id), make([]byte, detailsSize)})
	}
	mroot, droot := im.tree(8, maps_), im.tree(detailsSize, details)
	b := im.block(0)
	binary.LittleEndian.PutUint64(b[320:], mroot)
	binary.LittleEndian.PutUint64(b[328:], droot)
	im.seal(0, superblockXOR)
}

// newImage returns an image with a superblock and nothing else.
func newImage(fanout int) *image {
	im := &image{fanout: fanout}
	im.alloc()
	b := im.block(0)
	binary.LittleEndian.PutUint64(b[32:], superblockMagic)
	binary.LittleEndian.PutUint32(b[40:], 2)
	binary.LittleEndian.PutUint64(b[64:], 1<<20)
	binary.LittleEndian.PutUint32(b[336:], 128)
	binary.LittleEndian.PutUint32(b[340:], BlockSize/512)
	im.seal(0, superblockXOR)
	return im
}

func mapTo(block uint64, time uint32) []byte { return u64bytes(block<<24 | uint64(time)) }

// model maps blocks of a device to blocks of the pool.
type model map[uint64]uint64

func (m model) items() []item {
	var out []item
	for _, k := range slices.Sorted(maps.Keys(m)) {
		out = append(out, item{k, mapTo(m[k], 1)})
	}
	return out
}

// differ returns how each block differs.
func differ(a, b model) map[uint64]Kind {
	out := map[uint64]Kind{}
	for k, v := range a {
		if w, ok := b[k]; !ok {
			out[k] = LeftOnly
		} else if v != w {
			out[k] = Different
		}
	}
	for k := range b {
		if _, ok := a[k]; !ok {
			out[k] = RightOnly
		}
	}
	return out
}

// collect returns the blocks of a Diff, having checked its order and that no
// two ranges could be one.
func collect(t testing.TB, m *Metadata, a, b uint32) map[uint64]Kind {
	t.Helper()
	out := map[uint64]Kind{}
	var last Range
	for r, err := range m.Diff(a, b) {
		require.NoError(t, err)
		require.NotZero(t, r.Length)
		end := last.Begin + last.Length
		require.True(t, last.Length == 0 || r.Begin > end || r.Begin == end && r.Kind != last.Kind, "%v after %v", r, last)
		for i := range r.Length {
			out[r.Begin+i] = r.Kind
		}
		last = r
	}
	return out
}

// content returns the mappings of a device.
func content(t testing.TB, m *Metadata, id uint32) model {
	t.Helper()
	out := model{}
	for r, err := range m.Mappings(id) {
		require.NoError(t, err)
		for i := range r.Length {
			if _, ok := out[r.Begin+i]; ok {
				t.Fatalf("block %d twice", r.Begin+i)
			}
			out[r.Begin+i] = r.Data + i
		}
	}
	return out
}

// run runs one of the thin tools.
func run(t testing.TB, name string, args ...string) []byte {
	t.Helper()
	out, err := exec.Command(testenv.RequireTool(t, name), args...).CombinedOutput()
	require.NoError(t, err, "%s %s: %s", name, strings.Join(args, " "), out)
	return out
}

// thinDelta is the oracle: what thin_delta says.
func thinDelta(t testing.TB, file string, a, b uint32, more ...string) map[uint64]Kind {
	t.Helper()
	out := run(t, "thin_delta", append([]string{"--thin1", fmt.Sprint(a), "--thin2", fmt.Sprint(b), file}, more...)...)
	type span struct {
		XMLName xml.Name
		Begin   uint64 `xml:"begin,attr"`
		Length  uint64 `xml:"length,attr"`
	}
	var doc struct {
		Diff struct {
			Spans []span `xml:",any"`
		} `xml:"diff"`
	}
	require.NoError(t, xml.Unmarshal(out, &doc), "%s", out)
	kinds := map[string]Kind{"left_only": LeftOnly, "right_only": RightOnly, "different": Different}
	got := map[uint64]Kind{}
	for _, s := range doc.Diff.Spans {
		if s.XMLName.Local == "same" {
			continue
		}
		require.Contains(t, kinds, s.XMLName.Local)
		for i := range s.Length {
			got[s.Begin+i] = kinds[s.XMLName.Local]
		}
	}
	return got
}

// restore writes metadata with thin_restore and reads it.
func restore(t testing.TB, devices map[uint32]model) (file string, im *image) {
	t.Helper()
	dir := t.TempDir()
	var b strings.Builder
	b.WriteString(`<superblock uuid="" time="3" transaction="42" flags="0" version="2" data_block_size="256" nr_data_blocks="200000">` + "\n")
	for _, id := range slices.Sorted(maps.Keys(devices)) {
		fmt.Fprintf(&b, "<device dev_id=\"%d\" mapped_blocks=\"%d\" transaction=\"7\" creation_time=\"1\" snap_time=\"2\">\n", id, len(devices[id]))
		for _, k := range slices.Sorted(maps.Keys(devices[id])) {
			fmt.Fprintf(&b, "<single_mapping origin_block=\"%d\" data_block=\"%d\" time=\"1\"/>\n", k, devices[id][k])
		}
		b.WriteString("</device>\n")
	}
	b.WriteString("</superblock>\n")
	src, file := filepath.Join(dir, "in.xml"), filepath.Join(dir, "metadata")
	require.NoError(t, os.WriteFile(src, []byte(b.String()), 0o644))
	require.NoError(t, os.WriteFile(file, make([]byte, 16<<20), 0o644))
	run(t, "thin_restore", "-i", src, "-o", file)
	data, err := os.ReadFile(file)
	require.NoError(t, err)
	return file, &image{data: data, fanout: 200}
}
