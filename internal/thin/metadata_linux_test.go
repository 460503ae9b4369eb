package thin

import (
	"bytes"
	"encoding/binary"
	"errors"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/layerfs/layerfs/internal/testenv"
)

// random returns n mappings of blocks below limit.
func random(r *rand.Rand, n int, limit uint64) model {
	m := model{}
	for len(m) < n {
		// Runs, as file systems write.
		at, data := r.Uint64N(limit), r.Uint64N(150000)
		for i := range min(r.Uint64N(20)+1, uint64(n-len(m))) {
			m[at+i] = data + i
		}
	}
	return m
}

func TestAgainstThinRestore(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 2))
	devices := map[uint32]model{
		0: {}, 1: {0: 5}, 2: random(r, 1000, 1<<14), 3: random(r, 5000, 1<<20), 4: random(r, 900, 1<<14), maxDeviceID: random(r, 10, 1<<50),
	}
	file, im := restore(t, devices)
	m, err := Open(im, 0)
	require.NoError(t, err)
	require.Equal(t, uint64(42), m.TransactionID)
	require.Equal(t, uint32(3), m.Time)
	require.Equal(t, uint32(256), m.BlockSectors)
	require.Equal(t, uint64(200000), m.DataBlocks)
	seen := 0
	for d, err := range m.Devices() {
		require.NoError(t, err)
		require.Contains(t, devices, d.ID)
		require.Equal(t, uint64(len(devices[d.ID])), d.Mapped)
		require.Equal(t, uint64(7), d.TransactionID)
		require.Equal(t, []uint32{1, 2}, []uint32{d.Created, d.Snapshotted})
		one, err := m.Device(d.ID)
		require.NoError(t, err)
		require.Equal(t, d, one)
		require.Equal(t, devices[d.ID], content(t, m, d.ID))
		seen++
	}
	require.Equal(t, len(devices), seen)
	_, err = m.Device(77)
	require.ErrorIs(t, err, ErrNoDevice)
	for _, err := range m.Diff(1, 77) {
		require.ErrorIs(t, err, ErrNoDevice)
	}
	for _, p := range [][2]uint32{{0, 1}, {1, 0}, {2, 4}, {3, 2}, {3, 3}, {0, 0}} {
		want := differ(devices[p[0]], devices[p[1]])
		require.Equal(t, want, thinDelta(t, file, p[0], p[1]), "the oracle itself")
		require.Equal(t, want, collect(t, m, p[0], p[1]))
	}
}

// snapshots builds a device and copies of it with random changes, which share
// nodes with it.
func snapshots(im *image, r *rand.Rand, base model, changes []int) []model {
	roots := map[uint32]uint64{1: im.tree(8, base.items())}
	models := []model{nil, base}
	for i, n := range changes {
		root, cur := roots[1], model{}
		for k, v := range base {
			cur[k] = v
		}
		for range n {
			k := r.Uint64N(uint64(3 * len(base)))
			var v []byte
			if r.IntN(3) > 0 {
				v = mapTo(160000+r.Uint64N(30000), 2)
			}
			root = im.change(root, k, v)
		}
		roots[uint32(i+2)] = root
		im.finish(roots) // to read it back below; the last one counts
		m, err := Open(im, 0)
		if err != nil {
			panic(err)
		}
		clear(cur)
		for r, err := range m.Mappings(uint32(i + 2)) {
			if err != nil {
				panic(err)
			}
			for j := range r.Length {
				cur[r.Begin+j] = r.Data + j
			}
		}
		models = append(models, cur)
	}
	return models
}

func TestDiffOfSnapshots(t *testing.T) {
	r := rand.New(rand.NewPCG(3, 4))
	base := model{}
	for i := range uint64(16200) {
		base[i*2] = i
	}
	file, im := restore(t, map[uint32]model{1: {0: 0}})
	im.fanout = 90 // three levels, each node at least as full as thin_delta wants
	models := snapshots(im, r, base, []int{0, 1, 1000})
	require.NoError(t, os.WriteFile(file, im.data, 0o644))
	dev, err := OpenDevice(file)
	require.NoError(t, err)
	defer func() { require.NoError(t, dev.Close()) }()
	m, err := Open(dev, 0)
	require.NoError(t, err)
	for a := uint32(1); a < uint32(len(models)); a++ {
		for b := uint32(1); b < uint32(len(models)); b++ {
			want := thinDelta(t, file, a, b)
			require.Equal(t, want, differ(models[a], models[b]), "%d %d", a, b)
			require.Equal(t, want, collect(t, m, a, b), "%d %d", a, b)
		}
	}
	require.Empty(t, collect(t, m, 1, 2))
	require.NotEmpty(t, collect(t, m, 1, 3))
}

// The cost must follow the changes: at most the path to each changed leaf, on
// both sides.
func TestDiffCost(t *testing.T) {
	r := rand.New(rand.NewPCG(5, 6))
	for _, size := range []uint64{17000, 40000} {
		base := model{}
		for i := range size {
			base[i] = i
		}
		im := newImage(126)
		snapshots(im, r, base, []int{1, 10})
		for id, changes := range map[uint32]int64{2: 1, 3: 10} {
			m, err := Open(im, 0)
			require.NoError(t, err)
			collect(t, m, 1, id)
			// Root and device lookups, the leftmost paths, and for each change
			// three levels on each side.
			require.LessOrEqual(t, m.Reads(), 13+6*changes, "%d blocks, %d changes", size, changes)
		}
	}
}

func TestDiffStops(t *testing.T) {
	im := newImage(3)
	im.finish(map[uint32]uint64{
		1: im.tree(8, model{1: 1, 3: 3, 5: 5, 7: 7}.items()),
		2: im.tree(8, model{}.items()),
	})
	m, err := Open(im, 0)
	require.NoError(t, err)
	n := 0
	for r, err := range m.Diff(1, 2) {
		require.NoError(t, err)
		require.Equal(t, Range{uint64(2*n + 1), 1, LeftOnly}, r)
		if n++; n == 2 {
			break
		}
	}
	require.Equal(t, 2, n)
	for range m.Devices() {
		break
	}
	for range m.Mappings(1) {
		break
	}
}

func TestCorrupt(t *testing.T) {
	fresh := func() (*image, uint64) {
		im := newImage(3)
		root := im.tree(8, model{1: 1, 3: 3, 5: 5, 7: 7}.items())
		im.finish(map[uint32]uint64{1: root, 2: im.change(root, 1, mapTo(9, 2))})
		return im, root
	}
	put32 := func(off int, v uint32) func([]byte) {
		return func(b []byte) { binary.LittleEndian.PutUint32(b[off:], v) }
	}
	put64 := func(off int, v uint64) func([]byte) {
		return func(b []byte) { binary.LittleEndian.PutUint64(b[off:], v) }
	}
	for _, c := range []struct {
		name   string
		super  bool
		change func([]byte)
		seal   bool
		say    string
	}{
		{"magic", true, put64(32, 1), true, "no superblock"},
		{"version", true, put32(40, 3), true, "version 3"},
		{"features", true, put32(360, 1), true, "incompatible features"},
		{"block size", true, put32(340, 7), true, "metadata blocks of 7"},
		{"superblock checksum", true, put32(44, 7), false, "checksum"},
		{"root far away", true, put64(320, 1<<60), true, "out of range"},
		{"root beyond the end", true, put64(320, 1<<30), true, ""},
		{"node checksum", false, put32(100, 7), false, "checksum"},
		{"flags", false, put32(4, 3), true, "flags 0x3"},
		{"value size", false, put32(24, 16), true, "values of 16 bytes"},
		{"too many entries", false, put32(16, 253), true, "253 of 252 entries"},
		{"too large", false, put32(20, 255), true, "entries"},
		{"no entries", false, put32(16, 0), true, "without entries"},
		{"itself", false, func(b []byte) { put64(nodeHead+8*252, binary.LittleEndian.Uint64(b[8:]))(b) }, true, "out of order"},
		{"keys out of order", false, put64(nodeHead+8, 0), true, "out of order"},
		{"key above the child's", false, put64(nodeHead, 2), true, "out of order"},
		{"leaf for an internal node", false, put32(4, leafNode), true, ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			im, root := fresh()
			at, xor := root, uint32(nodeXOR)
			if c.super {
				at, xor = 0, superblockXOR
			}
			c.change(im.block(at))
			if c.seal {
				im.seal(at, xor)
			}
			err := walk(im)
			if c.say == "" && err == nil {
				return // well formed, if not what it was
			}
			require.Error(t, err)
			require.ErrorContains(t, err, c.say)
			if c.name != "root beyond the end" {
				require.ErrorIs(t, err, ErrCorrupt)
			}
		})
	}
}

// walk reads everything and returns the errors.
func walk(im *image) error {
	m, err := Open(im, 0)
	if err != nil {
		return err
	}
	var errs []error
	n := 0
	for d, err := range m.Devices() {
		errs = append(errs, err)
		if n++; n > 50 || err != nil {
			break
		}
		for _, err := range m.Mappings(d.ID) {
			errs = append(errs, err)
		}
	}
	for _, err := range m.Diff(1, 2) {
		errs = append(errs, err)
	}
	return errors.Join(errs...)
}

func TestChecksumVectors(t *testing.T) {
	// The superblock of an empty pool as thin_restore writes it.
	_, im := restore(t, map[uint32]model{})
	b := im.block(0)
	require.Equal(t, binary.LittleEndian.Uint32(b), checksum(b, superblockXOR))
}

// FuzzWalk changes metadata at will, with checksums that fit, and reads it.
func FuzzWalk(f *testing.F) {
	f.Add([]byte{1, 0, 16, 1, 2, 0, 24, 0})
	f.Fuzz(func(t *testing.T, edits []byte) {
		im := newImage(3)
		root := im.tree(8, model{1: 1, 3: 3, 5: 5, 7: 7, 9: 9, 11: 11, 13: 13, 15: 15, 17: 17, 19: 19}.items())
		im.finish(map[uint32]uint64{1: root, 2: im.change(im.change(root, 1, mapTo(9, 2)), 19, nil)})
		blocks := uint64(len(im.data) / BlockSize)
		touched := map[uint64]bool{}
		for ; len(edits) >= 4; edits = edits[4:] {
			n := uint64(edits[0]) % blocks
			off := int(binary.LittleEndian.Uint16(edits[1:])) % BlockSize
			im.block(n)[off] = edits[3]
			touched[n] = true
		}
		for n := range touched {
			xor := uint32(nodeXOR)
			if n == 0 {
				xor = superblockXOR
			}
			im.seal(n, xor)
		}
		m, err := Open(im, 0)
		if err != nil {
			return
		}
		for _, err := range m.Mappings(1) {
			_ = err
		}
		// The two lookups, the leftmost path again, and each block once.
		if most := int64(1 + 4*maxHeight + int(blocks)); m.Reads() > most {
			t.Errorf("%d reads of %d blocks", m.Reads(), blocks)
		}
		_ = walk(im)
	})
}

func BenchmarkDiff(b *testing.B) {
	r := rand.New(rand.NewPCG(7, 8))
	base := model{}
	for i := range uint64(163840) { // 10 GiB of 64 KiB
		base[i] = i
	}
	im := newImage(126)
	snapshots(im, r, base, []int{100})
	for b.Loop() {
		m, err := Open(im, 0)
		require.NoError(b, err)
		collect(b, m, 1, 2)
		b.ReportMetric(float64(m.Reads()), "reads/op")
	}
}

func TestDeviceReader(t *testing.T) {
	const blocks = 37
	data := make([]byte, blocks*BlockSize)
	for i := range data {
		data[i] = byte(i / BlockSize * 7)
	}
	name := filepath.Join(t.TempDir(), "metadata")
	require.NoError(t, os.WriteFile(name, data, 0o600))
	testenv.WithAndWithout(t, "direct", func(t *testing.T, on bool) {
		d, err := openDevice(name, on)
		if errors.Is(err, unix.EINVAL) {
			t.Skip("no direct I/O on this file system")
		}
		require.NoError(t, err)
		b := make([]byte, BlockSize)
		r := rand.New(rand.NewPCG(1, 1))
		for range 200 {
			i := r.IntN(blocks)
			_, err := d.ReadAt(b, int64(i)*BlockSize)
			require.NoError(t, err)
			require.True(t, bytes.Equal(b, data[i*BlockSize:(i+1)*BlockSize]), "block %d", i)
		}
		_, err = d.ReadAt(b, blocks*BlockSize)
		require.ErrorIs(t, err, io.EOF)
		_, err = d.ReadAt(b, 1)
		require.ErrorContains(t, err, "is no block")
		_, err = d.ReadAt(b[:1], 0)
		require.ErrorContains(t, err, "is no block")
		require.NoError(t, d.Close())
		require.ErrorIs(t, d.Close(), os.ErrClosed)
		_, err = d.ReadAt(b, 0)
		require.ErrorIs(t, err, os.ErrClosed)
	})
}
