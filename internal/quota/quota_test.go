package quota

import (
	"errors"
	"math"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/layerfs/layerfs"
)

func TestSectors(t *testing.T) {
	for bytes, want := range map[int64]uint64{0: 0, 1: 1, 512: 1, 513: 2, 1 << 30: 1 << 21, math.MaxInt64 - 511: 1<<54 - 1} {
		assert.Equal(t, want, sectors(bytes), bytes)
	}
}

func TestCheck(t *testing.T) {
	require.NoError(t, check(layerfs.Quota{}))
	require.NoError(t, check(layerfs.Quota{Bytes: 1, Inodes: 1}))
	require.Error(t, check(layerfs.Quota{Bytes: -1}))
	require.Error(t, check(layerfs.Quota{Inodes: -1}))
}

func TestUnused(t *testing.T) {
	broken := errors.New("broken")
	for _, tt := range []struct {
		name  string
		first uint32
		used  []uint32
		busy  map[uint32]bool
		want  uint32
		err   error
	}{
		{"none", 100, nil, nil, 100, nil},
		{"zero", 0, nil, nil, 1, nil},
		{"gap", 100, []uint32{103, 101, 100, 0, 101}, nil, 102, nil},
		{"busy", 100, []uint32{100}, map[uint32]bool{101: true, 102: true}, 103, nil},
		{"last", math.MaxUint32, nil, nil, math.MaxUint32, nil},
		{"error", 7, nil, nil, 0, broken},
	} {
		t.Run(tt.name, func(t *testing.T) {
			got, err := unused(tt.first, tt.used, func(id uint32) (bool, error) { return tt.busy[id], tt.err })
			require.ErrorIs(t, err, tt.err)
			assert.Equal(t, tt.want, got)
		})
	}
	_, err := unused(math.MaxUint32, []uint32{math.MaxUint32}, func(uint32) (bool, error) { return false, nil })
	require.Error(t, err)
}
