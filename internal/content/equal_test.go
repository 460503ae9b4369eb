package content

import (
	"bytes"
	"context"
	"errors"
	"io"
	"testing"
	"testing/iotest"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

func TestEqual(t *testing.T) {
	text := func(n int, changed ...int) []byte {
		b := bytes.Repeat([]byte("abcdefg"), n/7+1)[:n]
		for _, i := range changed {
			b[i] ^= 1
		}
		return b
	}
	for _, tt := range []struct {
		name string
		a, b []byte
		want bool
	}{
		{"empty", nil, nil, true},
		{"empty and not", nil, text(1), false},
		{"one chunk", text(chunk), text(chunk), true},
		{"chunks", text(3*chunk + 5), text(3*chunk + 5), true},
		{"a prefix", text(chunk), text(chunk + 1), false},
		{"a prefix of whole chunks", text(2 * chunk), text(3 * chunk), false},
		{"the last byte", text(2*chunk + 9), text(2*chunk+9, 2*chunk+8), false},
		{"the first byte", text(2*chunk + 9), text(2*chunk+9, 0), false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			for _, dir := range [][2][]byte{{tt.a, tt.b}, {tt.b, tt.a}} {
				got, err := Equal(t.Context(), bytes.NewReader(dir[0]), iotest.HalfReader(bytes.NewReader(dir[1])))
				require.NoError(t, err)
				assert.Equal(t, tt.want, got)
			}
		})
	}
}

// TestEqualError: a reader that fails is no different file.
func TestEqualError(t *testing.T) {
	broken := errors.New("broken")
	whole := func() io.Reader { return bytes.NewReader(make([]byte, chunk)) }
	for _, want := range []error{broken, io.ErrUnexpectedEOF} {
		failing := func() io.Reader { return io.MultiReader(bytes.NewReader(make([]byte, 10)), iotest.ErrReader(want)) }
		_, err := Equal(t.Context(), failing(), whole())
		require.ErrorIs(t, err, want)
		_, err = Equal(t.Context(), whole(), failing())
		require.ErrorIs(t, err, want)
		_, err = Equal(t.Context(), failing(), failing())
		require.ErrorIs(t, err, want)
	}
	ctx, cancel := context.WithCancelCause(t.Context())
	cancel(broken)
	_, err := Equal(ctx, whole(), whole())
	require.ErrorIs(t, err, broken)
}
