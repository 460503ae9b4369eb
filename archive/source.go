package archive

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"hash"
	"io"
	"sync/atomic"
	"time"

	"github.com/layerfs/layerfs"
)

const (
	blockSize = 512

	// chunkSize is what is read at once: a multiple of blockSize, so that no
	// header crosses two chunks, and small enough that a chunk is still in
	// the cache of the processor when it is hashed and written.
	chunkSize = 256 << 10

	// maxChunks limits the memory of one Apply to 8 MiB of chunks.
	maxChunks = 32
)

// chunk is a piece of the stream. It is shared by the digest, the parser and
// whoever writes a file from it; the last one to release it gives it back.
type chunk struct {
	buf  []byte // what is used of the buffer
	refs atomic.Int32
	home *source
}

func (c *chunk) retain() { c.refs.Add(1) }

func (c *chunk) release() {
	if c.refs.Add(-1) == 0 {
		c.home.free <- c // has room for every chunk
	}
}

// source reads a stream in one goroutine, hashes it in another, and hands the
// chunks to the parser in order.
type source struct {
	free   chan *chunk
	out    chan *chunk // closed at the end of the stream or after an error
	digest chan *chunk
	stop   context.CancelFunc
	done   chan struct{} // closed when both goroutines have ended

	// Written by the reading goroutine before out is closed.
	err  error
	size int64

	hash hash.Hash // nil if no digest was asked for

	raw     *inputReader
	bytes   atomic.Int64 // read so far, for progress
	entries atomic.Int64 // found so far by the parser, for progress
}

// newSource starts reading. ratio is the limit of expansion, 0 for none.
func newSource(ctx context.Context, r io.Reader, ratio int64, digest bool) *source {
	ctx, stop := context.WithCancel(ctx)
	s := &source{
		free:   make(chan *chunk, maxChunks),
		out:    make(chan *chunk, maxChunks),
		digest: make(chan *chunk, maxChunks),
		done:   make(chan struct{}),
		stop:   stop,
		raw:    &inputReader{r: r},
	}
	hashed := make(chan struct{})
	if digest {
		s.hash = sha256.New()
		go func() {
			defer close(hashed)
			for c := range s.digest {
				s.hash.Write(c.buf)
				c.release()
			}
		}()
	} else {
		close(hashed)
	}
	go func() {
		s.err = s.read(ctx, ratio)
		close(s.out)
		close(s.digest)
		<-hashed
		close(s.done)
	}()
	return s
}

// ratioFrom is where the limit of expansion starts to count: a small stream of
// zeros expands a lot and harms nobody.
const ratioFrom = 64 << 20

func (s *source) read(ctx context.Context, ratio int64) error {
	z, c, err := Decompress(s.raw)
	if err != nil {
		return err
	}
	defer z.Close()
	made := 0
	for {
		var b *chunk
		select {
		case b = <-s.free:
		default:
			if made < maxChunks {
				made++
				b = &chunk{buf: make([]byte, chunkSize), home: s}
				break
			}
			select {
			case b = <-s.free:
			case <-ctx.Done():
				return context.Cause(ctx)
			}
		}
		if err := ctx.Err(); err != nil {
			return context.Cause(ctx)
		}
		n, err := readFull(z, b.buf[:chunkSize])
		b.buf = b.buf[:n]
		s.size += int64(n)
		s.bytes.Store(s.size)
		if n > 0 {
			b.refs.Store(1)
			if s.hash != nil {
				b.refs.Store(2)
				s.digest <- b
			}
			s.out <- b
		}
		switch {
		case err == io.EOF:
			return nil
		case err != nil:
			return err
		}
		if in := s.raw.n.Load(); c != layerfs.NoCompression && ratio > 0 && s.size > ratioFrom && s.size/ratio > in {
			return overLimit("expands %d bytes to more than %d, ratio over %d", in, s.size, ratio)
		}
	}
}

// readFull fills p. Other than io.ReadFull it gives io.EOF for the end of the
// stream only, so that a reader's own io.ErrUnexpectedEOF stays an error.
func readFull(r io.Reader, p []byte) (n int, err error) {
	empty := 0
	for n < len(p) && err == nil {
		var m int
		m, err = r.Read(p[n:])
		n += m
		if m > 0 {
			empty = 0
		} else if empty++; empty == 100 && err == nil {
			err = io.ErrNoProgress
		}
	}
	if n == len(p) && err == io.EOF {
		err = nil // the next call meets it again
	}
	return n, err
}

// sum returns the digest of the stream. The goroutines must have ended.
func (s *source) sum() string {
	if s.hash == nil {
		return ""
	}
	return "sha256:" + hex.EncodeToString(s.hash.Sum(nil))
}

// close ends the goroutines. Chunks that were handed out stay valid. A Read
// that is under way cannot be interrupted; close waits for it unless the
// context of the call has ended, when a goroutine is left to it.
func (s *source) close(ctx context.Context) {
	s.stop()
	for {
		select {
		case c, ok := <-s.out:
			if !ok {
				<-s.done
				return
			}
			c.release()
		case <-ctx.Done():
			// Give a reader that is not stuck the time to notice.
			t := time.NewTimer(100 * time.Millisecond)
			defer t.Stop()
			for {
				select {
				case c, ok := <-s.out:
					if !ok {
						<-s.done
						return
					}
					c.release()
				case <-t.C:
					return
				}
			}
		}
	}
}
