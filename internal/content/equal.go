// Package content compares what files hold.
package content

import (
	"bytes"
	"context"
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

// fill reads until buf is full or the reader ends. io.ReadFull would not tell
// that end from a reader that fails with io.ErrUnexpectedEOF.
func fill(r io.Reader, buf []byte) (n int, err error) {
	for n < len(buf) && err == nil {
		var k int
		k, err = r.Read(buf[n:])
		n += k
	}
	if err == io.EOF { //nolint:errorlint // readers return it bare
		err = nil
	}
	return n, err
}
