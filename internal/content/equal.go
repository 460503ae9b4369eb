// Package content compares what files hold.
package content

import (
	"bytes"
	"context"
	"errors"
	"io"
)

const chunk = 128 << 10

// Equal reports whether two readers give the same bytes up to their ends. Where
// one cannot be read it is an error, never a difference: what was read before
// may be less than there is. It ends with the cause of ctx between two chunks.
func Equal(ctx context.Context, a, b io.Reader) (bool, error) {
	buf := make([]byte, 2*chunk)
	x, y := buf[:chunk], buf[chunk:]
	for {
		if err := context.Cause(ctx); err != nil {
			return false, err
		}
		n, err := fill(a, x)
		if err != nil {
			return false, err
		}
		m, err := fill(b, y)
		if err != nil {
			return false, err
		}
		if !bytes.Equal(x[:n], y[:m]) {
			return false, nil
		}
		if n < chunk {
			return true, nil
		}
	}
}

// fill reads until buf is full or the reader ends.
func fill(r io.Reader, buf []byte) (int, error) {
	n, err := io.ReadFull(r, buf)
	if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
		err = nil
	}
	return n, err
}
