package dm

import (
	"encoding/binary"
	"testing"

	"github.com/stretchr/testify/require"
)

func TestThinPoolTarget(t *testing.T) {
	for _, c := range []struct {
		name   string
		pool   ThinPool
		params string
	}{
		{
			"plain",
			ThinPool{Length: 2097152, Metadata: "/dev/loop0", Data: "7:1", BlockSectors: 128, LowWater: 32768},
			"/dev/loop0 7:1 128 32768 0",
		},
		{
			"all",
			ThinPool{
				Length: 1, Metadata: "a", Data: "b", BlockSectors: 2097152,
				SkipBlockZeroing: true, IgnoreDiscard: true, NoDiscardPassdown: true, ReadOnly: true, ErrorIfNoSpace: true,
			},
			"a b 2097152 0 5 skip_block_zeroing ignore_discard no_discard_passdown read_only error_if_no_space",
		},
	} {
		t.Run(c.name, func(t *testing.T) {
			got, err := c.pool.Target()
			require.NoError(t, err)
			require.Equal(t, Target{Length: c.pool.Length, Type: "thin-pool", Params: c.params}, got)
			back, err := ParseThinPool(got)
			require.NoError(t, err)
			require.Equal(t, c.pool, back)
		})
	}
	_, err := ThinPool{BlockSectors: 127, Metadata: "a b"}.Target()
	for _, part := range []string{"block size of 127", "no data", `metadata device "a b"`, `data device ""`} {
		require.ErrorContains(t, err, part)
	}
}

func TestParseThinPoolRefuses(t *testing.T) {
	for _, params := range []string{
		"", "a b 128", "a b c 1", "a b 128 x", "a b 128 1 2 read_only", "a b 128 1 1 nonsense", "a b 100 1 0", "a b 128 1 -1",
	} {
		_, err := ParseThinPool(Target{Length: 1, Type: "thin-pool", Params: params})
		require.Error(t, err, params)
	}
}

func TestThinTarget(t *testing.T) {
	for params, d := range map[string]Thin{
		"253:0 7":               {Length: 8, Pool: "253:0", ID: 7},
		"253:0 16777215 /dev/x": {Length: 8, Pool: "253:0", ID: MaxThinID, Origin: "/dev/x"},
	} {
		got, err := d.Target()
		require.NoError(t, err)
		require.Equal(t, Target{Length: 8, Type: "thin", Params: params}, got)
		back, err := ParseThin(got)
		require.NoError(t, err)
		require.Equal(t, d, back)
	}
	_, err := Thin{Pool: "p", ID: MaxThinID + 1}.Target()
	require.ErrorContains(t, err, "id 16777216 is above")
	require.ErrorContains(t, err, "no sectors")
	_, err = ParseThin(Target{Length: 8, Type: "thin", Params: "253:0 16777216"})
	require.Error(t, err)
}

func TestLinearTarget(t *testing.T) {
	l := Linear{Start: 8, Length: 16, Device: "7:0", Offset: 2048}
	got, err := l.Target()
	require.NoError(t, err)
	require.Equal(t, "8 16 linear 7:0 2048", got.String())
	back, err := ParseLinear(got)
	require.NoError(t, err)
	require.Equal(t, l, back)
	require.Equal(t, "0 9 error", ErrorTarget(0, 9).String())
}

func TestDeviceNumber(t *testing.T) {
	// Values of new_encode_dev, include/linux/kdev_t.h.
	for d, v := range map[Device]uint64{
		{253, 4}: 0xfd04, {0xfff, 0xfffff}: 0xffffffff, {1, 256}: 0x100100,
	} {
		require.Equal(t, v, d.encode())
		require.Equal(t, d, decodeDevice(v))
		back, err := ParseDevice(d.String())
		require.NoError(t, err)
		require.Equal(t, d, back)
	}
	for _, s := range []string{"", "1", "1:", ":1", "4096:0", "a:b", "1:2:3", "-1:0"} {
		_, err := ParseDevice(s)
		require.Error(t, err, s)
	}
}

func TestParsePoolStatus(t *testing.T) {
	for line, want := range map[string]PoolStatus{
		// As a Linux 6.1 guest printed them.
		"0 11/1024 0/1600 - rw discard_passdown queue_if_no_space - 256": {
			Mode: PoolReadWrite, UsedMeta: 11, TotalMeta: 1024, TotalData: 1600, DiscardPassdown: true, MetaLowWater: 256,
		},
		"7 20/1024 1600/1600 17 out_of_data_space no_discard_passdown error_if_no_space needs_check 256": {
			Mode: PoolOutOfSpace, TransactionID: 7, UsedMeta: 20, TotalMeta: 1024, UsedData: 1600, TotalData: 1600,
			HeldRoot: 17, ErrorIfNoSpace: true, NeedsCheck: true, MetaLowWater: 256,
		},
		"1 2/3 4/5 - ro ignore_discard": {Mode: PoolReadOnly, TransactionID: 1, UsedMeta: 2, TotalMeta: 3, UsedData: 4, TotalData: 5, IgnoreDiscard: true},
		"Fail":                          {Mode: PoolFail},
		"Error":                         {Mode: PoolError},
	} {
		got, err := ParsePoolStatus(line)
		require.NoError(t, err, line)
		require.Equal(t, want, got, line)
	}
	for _, line := range []string{
		"", "rw", "1 2/3 4/5 -", "x 2/3 4/5 - rw", "1 3/2 4/5 - rw", "1 2/3 4 - rw", "1 2/3 4/5 x rw", "1 2/3 4/5 - xx",
		"1 2/3 4/5 - rw surprise", "1 2/3 4/5 - rw 256 needs_check", "-1 2/3 4/5 - rw",
	} {
		_, err := ParsePoolStatus(line)
		require.Error(t, err, line)
	}
}

func TestParseThinStatus(t *testing.T) {
	for line, want := range map[string]ThinStatus{
		"0 -": {}, "-": {}, "Fail": {Failed: "Fail"}, "Error": {Failed: "Error"},
		"256 1279": {Mapped: 256, Highest: 1279},
	} {
		got, err := ParseThinStatus(line)
		require.NoError(t, err, line)
		require.Equal(t, want, got, line)
	}
	for _, line := range []string{"", "1", "1 -", "x 1", "1 x", "1 2 3"} {
		_, err := ParseThinStatus(line)
		require.Error(t, err, line)
	}
}

func TestTargetsWire(t *testing.T) {
	table := []Target{{0, 8, "linear", "7:0 0"}, {8, 16, "error", ""}, {24, 1, "thin", "253:0 12345678"}}
	b, err := encodeTargets(table)
	require.NoError(t, err)
	require.Zero(t, len(b)%8)
	// The kernel answers with offsets from the first record, not from each.
	total := uint32(0)
	for off := 0; off < len(b); {
		size := binary.NativeEndian.Uint32(b[off+20:])
		total += size
		binary.NativeEndian.PutUint32(b[off+20:], total)
		off += int(size)
	}
	got, err := decodeTargets(b, 3)
	require.NoError(t, err)
	require.Equal(t, table, got)
	_, err = decodeTargets(b, 4)
	require.Error(t, err, "a target too many")
	for _, bad := range []Target{{}, {Type: "sixteen-letters-"}, {Type: "a\x00"}, {Type: "a", Params: "\x00"}} {
		_, err := encodeTargets([]Target{bad})
		require.Error(t, err)
	}
}

func FuzzParse(f *testing.F) {
	f.Add("0 11/1024 0/1600 - rw discard_passdown queue_if_no_space - 256")
	f.Add("256 1279")
	f.Add("/dev/a 253:1 128 0 1 read_only")
	f.Fuzz(func(t *testing.T, s string) {
		if p, err := ParseThinPool(Target{Length: 1, Type: "thin-pool", Params: s}); err == nil {
			again, err := p.Target()
			require.NoError(t, err)
			back, err := ParseThinPool(again)
			require.NoError(t, err)
			require.Equal(t, p, back)
		}
		if d, err := ParseThin(Target{Length: 1, Type: "thin", Params: s}); err == nil {
			_, err := d.Target()
			require.NoError(t, err)
		}
		if st, err := ParsePoolStatus(s); err == nil && (st.UsedData > st.TotalData || st.Mode == "") {
			t.Errorf("%q: %+v", s, st)
		}
		_, _ = ParseThinStatus(s)
		_, _ = ParseLinear(Target{Type: "linear", Params: s})
		_, _ = ParseDevice(s)
	})
}

func FuzzDecode(f *testing.F) {
	b, err := encodeTargets([]Target{{0, 8, "linear", "7:0 0"}, {8, 16, "error", ""}})
	require.NoError(f, err)
	f.Add(b, uint32(2))
	f.Fuzz(func(_ *testing.T, b []byte, n uint32) {
		_, _ = decodeTargets(b, n)
		_, _ = decodeNames(b)
		_, _ = decodeVersions(b)
		_, _ = decodeDeps(b)
	})
}
