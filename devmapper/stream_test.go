package devmapper

import (
	"bytes"
	"io"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/layerfs/layerfs"
)

func sample(t testing.TB) []byte {
	t.Helper()
	var buf bytes.Buffer
	w, err := newStreamWriter(&buf, streamHeader{FS: "ext4", Size: 1 << 20, FSSize: 1 << 20, From: "one", To: "two"})
	require.NoError(t, err)
	require.NoError(t, w.record(recordData, 0, 512, bytes.Repeat([]byte{7}, 512)))
	require.NoError(t, w.record(recordHole, 4096, 8192, nil))
	require.NoError(t, w.record(recordData, 1<<20-1024, 1024, make([]byte, 1024)))
	require.NoError(t, w.end())
	require.Equal(t, int64(buf.Len()), w.bytes)
	return buf.Bytes()
}

func readAll(b []byte) (streamHeader, []blockRecord, error) {
	r, err := newStreamReader(bytes.NewReader(b))
	if err != nil {
		return streamHeader{}, nil, err
	}
	var out []blockRecord
	for {
		rec, err := r.next()
		if err == io.EOF {
			return r.header, out, nil
		}
		if err != nil {
			return r.header, out, err
		}
		rec.data = bytes.Clone(rec.data)
		out = append(out, rec)
	}
}

func TestStream(t *testing.T) {
	good := sample(t)
	h, recs, err := readAll(good)
	require.NoError(t, err)
	require.Equal(t, streamHeader{FS: "ext4", Size: 1 << 20, FSSize: 1 << 20, From: "one", To: "two"}, h)
	require.Len(t, recs, 3)
	require.Equal(t, bytes.Repeat([]byte{7}, 512), recs[0].data)
	require.Equal(t, blockRecord{offset: 4096, length: 8192, hole: true}, blockRecord{offset: recs[1].offset, length: recs[1].length, hole: recs[1].hole})
	// Cut anywhere, or with any bit turned, it is refused.
	for n := range good {
		_, _, err := readAll(good[:n])
		require.ErrorIs(t, err, layerfs.ErrMalformed, "cut at %d", n)
		bad := bytes.Clone(good)
		bad[n] ^= 0x10
		_, _, err = readAll(bad)
		require.Error(t, err, "bit in byte %d", n)
	}
}

func TestStreamRefuses(t *testing.T) {
	header := streamHeader{FS: "ext4", Size: 1 << 20, FSSize: 1 << 20, To: "x"}
	type rec struct {
		t              recordType
		offset, length int64
	}
	for name, recs := range map[string][]rec{
		"beyond":   {{recordHole, 1 << 20, 512}},
		"across":   {{recordHole, 1<<20 - 512, 1024}},
		"overflow": {{recordHole, -512, 1024}},
		"overlap":  {{recordHole, 0, 4096}, {recordHole, 512, 512}},
		"order":    {{recordHole, 4096, 512}, {recordHole, 0, 512}},
		"uneven":   {{recordHole, 1, 512}},
		"empty":    {{recordHole, 0, 0}},
		"type":     {{9, 0, 512}},
	} {
		t.Run(name, func(t *testing.T) {
			var buf bytes.Buffer
			w, err := newStreamWriter(&buf, header)
			require.NoError(t, err)
			for _, r := range recs {
				require.NoError(t, w.record(r.t, uint64(r.offset), uint32(r.length), nil))
			}
			require.NoError(t, w.end())
			_, _, err = readAll(buf.Bytes())
			require.ErrorIs(t, err, layerfs.ErrMalformed)
		})
	}
	for name, h := range map[string]streamHeader{
		"no-fs": {Size: 512, FSSize: 512, To: "x"}, "no-state": {FS: "xfs", Size: 512, FSSize: 512},
		"no-size": {FS: "xfs", To: "x"}, "uneven-size": {FS: "xfs", Size: 1000, FSSize: 1000, To: "x"},
		"fs-larger": {FS: "xfs", Size: 512, FSSize: 1024, To: "x"},
	} {
		t.Run(name, func(t *testing.T) {
			var buf bytes.Buffer
			_, err := newStreamWriter(&buf, h)
			require.NoError(t, err)
			_, _, err = readAll(buf.Bytes())
			require.ErrorIs(t, err, layerfs.ErrMalformed)
		})
	}
}

func FuzzStream(f *testing.F) {
	f.Add(sample(f))
	f.Add([]byte(streamMagic))
	f.Fuzz(func(t *testing.T, b []byte) {
		h, recs, err := readAll(b)
		if err != nil {
			return
		}
		var buf bytes.Buffer
		w, err := newStreamWriter(&buf, h)
		require.NoError(t, err)
		for _, r := range recs {
			typ := recordData
			if r.hole {
				typ = recordHole
			}
			require.NoError(t, w.record(typ, uint64(r.offset), uint32(r.length), r.data))
		}
		require.NoError(t, w.end())
		_, again, err := readAll(buf.Bytes())
		require.NoError(t, err)
		require.Equal(t, recs, again)
	})
}
