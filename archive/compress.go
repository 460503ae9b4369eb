package archive

import (
	"bufio"
	"bytes"
	"compress/bzip2"
	"errors"
	"fmt"
	"io"
	"sync/atomic"

	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"
	"github.com/ulikunitz/xz"

	"github.com/layerfs/layerfs"
)

// Detect returns the compression of a stream that starts with head, of which
// six bytes suffice. What is not known is taken for not compressed.
func Detect(head []byte) layerfs.Compression {
	for _, m := range []struct {
		magic string
		c     layerfs.Compression
	}{
		{"\x1f\x8b", layerfs.Gzip},
		{"\x28\xb5\x2f\xfd", layerfs.Zstd},
		{"BZh", layerfs.Bzip2},
		{"\xfd7zXZ\x00", layerfs.XZ},
	} {
		if bytes.HasPrefix(head, []byte(m.magic)) {
			return m.c
		}
	}
	// A zstd stream may start with a skippable frame (RFC 8878, 3.1.2):
	// 0x184D2A50 to 0x184D2A5F, little endian.
	if len(head) >= 4 && head[0]&0xf0 == 0x50 && string(head[1:4]) == "\x2a\x4d\x18" {
		return layerfs.Zstd
	}
	return layerfs.NoCompression
}

// Decompress returns the uncompressed form of r and how r was compressed. The
// reader must be closed; closing it does not close r. Errors in the compressed
// data match [layerfs.ErrMalformed]; errors of r come through as they are.
func Decompress(r io.Reader) (io.ReadCloser, layerfs.Compression, error) {
	in := &inputReader{r: r}
	head := make([]byte, 6)
	n, err := io.ReadFull(in, head)
	if err != nil && err != io.EOF && err != io.ErrUnexpectedEOF {
		return nil, 0, err
	}
	head = head[:n]
	c := Detect(head)
	joined := io.MultiReader(bytes.NewReader(head), in)
	if c == layerfs.NoCompression {
		return io.NopCloser(joined), c, nil
	}
	z, err := newDecompressor(joined, c)
	if err != nil {
		return nil, c, in.classify(c, err)
	}
	return &decompressor{z, in, c}, c, nil
}

func newDecompressor(r io.Reader, c layerfs.Compression) (io.ReadCloser, error) {
	// Decoders ask for single bytes; reads from a file should be large.
	br := bufio.NewReaderSize(r, 256<<10)
	switch c {
	case layerfs.Gzip:
		return gzip.NewReader(br)
	case layerfs.Zstd:
		// Windows of more than 128 MiB need --long from the zstd tool to be
		// read, too; without a limit 3.75 TiB could be asked for.
		d, err := zstd.NewReader(br, zstd.WithDecoderMaxWindow(128<<20))
		if err != nil {
			return nil, err
		}
		return d.IOReadCloser(), nil
	case layerfs.Bzip2:
		return io.NopCloser(bzip2.NewReader(br)), nil
	case layerfs.XZ:
		x, err := xz.ReaderConfig{DictCap: 64 << 20}.NewReader(br)
		if err != nil {
			return nil, err
		}
		return io.NopCloser(x), nil
	}
	return nil, fmt.Errorf("%w: compression %s", errors.ErrUnsupported, c)
}

// inputReader remembers the error of the reader below, so that it can be told
// from one of the decoder, and counts bytes.
type inputReader struct {
	r   io.Reader
	n   atomic.Int64
	err error // used by the goroutine that reads, or after it
}

func (i *inputReader) Read(p []byte) (int, error) {
	n, err := i.r.Read(p)
	i.n.Add(int64(n))
	if err != nil && err != io.EOF {
		i.err = err
	}
	return n, err
}

func (i *inputReader) classify(c layerfs.Compression, err error) error {
	switch {
	case err == nil || err == io.EOF:
		return err
	case i.err != nil && errors.Is(err, i.err):
		return err
	}
	return malformed("%s stream: %w", c, err)
}

type decompressor struct {
	io.ReadCloser
	in *inputReader
	c  layerfs.Compression
}

func (d *decompressor) Read(p []byte) (int, error) {
	n, err := d.ReadCloser.Read(p)
	return n, d.in.classify(d.c, err)
}

// newCompressor returns a writer into w. Closing it ends the stream and does
// not close w.
func newCompressor(w io.Writer, c layerfs.Compression, level int) (io.WriteCloser, error) {
	switch c {
	case layerfs.NoCompression:
		return nopCloser{w}, nil
	case layerfs.Gzip:
		if level == 0 {
			level = gzip.DefaultCompression
		}
		return gzip.NewWriterLevel(w, level)
	case layerfs.Zstd:
		l := zstd.SpeedDefault
		if level != 0 {
			l = zstd.EncoderLevelFromZstd(level)
		}
		return zstd.NewWriter(w, zstd.WithEncoderLevel(l))
	}
	return nil, &layerfs.UnsupportedError{Feature: "writing " + c.String()}
}

type nopCloser struct{ io.Writer }

func (nopCloser) Close() error { return nil }
