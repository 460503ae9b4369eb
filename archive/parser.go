package archive

import (
	"bytes"
	"context"
	"io"
	"strconv"
	"strings"

	"github.com/layerfs/layerfs"
)

// limits are [layerfs.Limits] with the defaults filled in; 0 means no limit.
type limits struct {
	bytes, entries, ratio  int64
	pathLength, xattrBytes int
}

func newLimits(l layerfs.Limits) limits {
	pick := func(v, def int64) int64 {
		switch {
		case v == 0:
			return def
		case v < 0:
			return 0
		}
		return v
	}
	return limits{
		bytes:      pick(l.Bytes, 0),
		entries:    pick(l.Entries, 0),
		ratio:      pick(l.Ratio, 1100),
		pathLength: int(pick(int64(l.PathLength), 4096)),
		xattrBytes: int(pick(int64(l.XattrBytes), 1<<20)),
	}
}

// special is the size of the largest extended header that is kept in memory.
func (l limits) special() int64 {
	const unlimited = 64 << 20
	if l.pathLength == 0 || l.xattrBytes == 0 {
		return unlimited
	}
	// Both paths, the xattrs (base64 takes a third more), and room for names,
	// lengths and maps of holes.
	return int64(2*l.pathLength) + int64(l.xattrBytes)*3/2 + 1<<20
}

// parser finds the entries of a stream.
type parser struct {
	ctx    context.Context
	src    *source
	lim    limits
	global []record

	cur  *chunk
	buf  []byte // what is left of cur
	left int64  // bytes of the entry's body that were not taken
	pad  int64  // bytes behind it up to a full block

	// onWait, if set, is called before the parser waits for the stream: the
	// time to let go of chunks.
	onWait func()

	entries int64
	content int64
	named   string // entry for errors, also when a header breaks half-way
}

// fill makes buf non-empty. The error is io.EOF at the end of the stream.
func (p *parser) fill() error {
	for len(p.buf) == 0 {
		if p.cur != nil {
			p.cur.release()
			p.cur = nil
		}
		if p.onWait != nil {
			p.onWait()
		}
		select {
		case c, ok := <-p.src.out:
			if !ok {
				if p.src.err != nil {
					return p.src.err
				}
				return io.EOF
			}
			p.cur, p.buf = c, c.buf
		case <-p.ctx.Done():
			return context.Cause(p.ctx)
		}
	}
	return nil
}

var errTruncated = malformed("truncated: %w", io.ErrUnexpectedEOF)

// block returns the next block. It is valid until the next call. The error is
// io.EOF if the stream ends here.
func (p *parser) block() ([]byte, error) {
	if err := p.fill(); err != nil {
		return nil, err
	}
	if len(p.buf) < blockSize {
		return nil, errTruncated // chunks are whole blocks but for the last
	}
	b := p.buf[:blockSize]
	p.buf = p.buf[blockSize:]
	return b, nil
}

// piece returns the next bytes of the entry's body and the chunk they are in,
// nil at its end. They are valid as long as the chunk is not released, which
// the parser does when it goes on.
func (p *parser) piece() ([]byte, *chunk, error) {
	if p.left == 0 {
		return nil, nil, nil
	}
	if err := p.fill(); err != nil {
		if err == io.EOF {
			err = errTruncated
		}
		return nil, nil, err
	}
	b := p.buf[:min(p.left, int64(len(p.buf)))]
	p.buf = p.buf[len(b):]
	p.left -= int64(len(b))
	return b, p.cur, nil
}

// skip goes to the next header.
func (p *parser) skip() error {
	p.left, p.pad = p.left+p.pad, 0
	for p.left > 0 {
		if _, _, err := p.piece(); err != nil {
			return err
		}
	}
	return nil
}

// setBody says that size bytes of body follow.
func (p *parser) setBody(size int64) {
	p.left, p.pad = size, -size&(blockSize-1)
}

// special reads the body of an extended header.
func (p *parser) special(size int64) (string, error) {
	if most := p.lim.special(); size > most {
		return "", overLimit("extended header of %d bytes, more than %d", size, most)
	}
	p.setBody(size)
	out := make([]byte, 0, size)
	for {
		b, _, err := p.piece()
		if err != nil {
			return "", err
		}
		if b == nil {
			break
		}
		out = append(out, b...)
	}
	return string(out), p.skip()
}

// next returns the next entry, whose body can be taken by piece; it is nil at
// the end. A stream without anything is an empty layer, one that has entries
// must have the mark of its end: without it, it cannot be told from one that
// was cut off.
func (p *parser) next() (*header, error) {
	if err := p.skip(); err != nil {
		return nil, err
	}
	p.named = ""
	var local []record
	var longName, longLink string
	for first := true; ; first = false {
		b, err := p.block()
		if err == io.EOF {
			if first && p.entries == 0 {
				return nil, nil
			}
			return nil, errTruncated
		}
		if err != nil {
			return nil, err
		}
		if b[0] == 0 && isZero(b) {
			if !first {
				return nil, malformed("extended header without an entry")
			}
			return nil, p.end()
		}
		h := new(header)
		if err := parseBlock(b, h); err != nil {
			return nil, err
		}
		p.named = h.name
		switch h.typ {
		case typePAX, typePAXGlobal:
			s, err := p.special(h.size)
			if err != nil {
				return nil, err
			}
			recs, err := parseRecords(s)
			if err != nil {
				return nil, err
			}
			if h.typ == typePAX {
				local = append(local, recs...)
			} else if err := p.addGlobal(recs); err != nil {
				return nil, err
			}
		case typeGNUName, typeGNULink:
			s, err := p.special(h.size)
			if err != nil {
				return nil, err
			}
			s = field([]byte(s))
			if h.typ == typeGNUName {
				longName = s
			} else {
				longLink = s
			}
		case typeGNUVolume:
			p.setBody(h.size)
			if err := p.skip(); err != nil {
				return nil, err
			}
		default:
			gnu := h.typ == typeGNUSparse
			var old []byte
			if gnu {
				old = bytes.Clone(b) // the block goes away with its chunk
			}
			if err := p.finish(h, local, longName, longLink, old); err != nil {
				return nil, err
			}
			return h, nil
		}
	}
}

// addGlobal keeps records that hold for all entries that follow. They are
// limited like those of one entry.
func (p *parser) addGlobal(recs []record) error {
	merged := make([]record, 0, len(p.global)+len(recs))
	seen := make(map[string]bool, len(recs))
	for _, r := range recs {
		seen[r.key] = true
	}
	for _, r := range p.global {
		if !seen[r.key] {
			merged = append(merged, r)
		}
	}
	merged = append(merged, recs...)
	var size int64
	for _, r := range merged {
		size += int64(len(r.key) + len(r.value))
	}
	if size > p.lim.special() {
		return overLimit("global headers of %d bytes", size)
	}
	p.global = merged
	return nil
}

// finish completes an entry with what extended headers say and checks it
// against the limits. old is the block of an entry in old GNU sparse format.
func (p *parser) finish(h *header, local []record, longName, longLink string, old []byte) error {
	var sp gnuSparse
	if err := applyRecords(h, p.global, &sp); err != nil {
		return err
	}
	if err := applyRecords(h, local, &sp); err != nil {
		return err
	}
	if longName != "" {
		h.name = longName
	}
	if longLink != "" {
		h.link = longLink
	}
	if sp.isSparse && sp.name != "" {
		h.name = sp.name
	}
	p.named = h.name
	// Before POSIX a directory was a file whose name ends in a slash.
	slash := strings.HasSuffix(h.name, "/")
	if h.typ == 0 && slash {
		h.typ = typeDir
	}
	h.stored = h.size
	switch h.typ {
	case 0, typeCont:
		h.typ = typeReg
	case typeReg:
		if slash {
			h.typ = typeDir
		}
	case typeGNUDump:
		h.typ = typeDir
	case typeLink, typeSymlink, typeChar, typeBlock, typeDir, typeFifo:
		// Some writers give a size for what has no body (pax, POSIX.1-2017: of a
		// directory, how large it may become).
		h.size, h.stored = 0, 0
	case typeGNUSparse:
	default:
		return malformed("unknown type %q", h.typ)
	}
	p.entries++
	p.src.entries.Store(p.entries)
	if p.lim.entries > 0 && p.entries > p.lim.entries {
		return overLimit("more than %d entries", p.lim.entries)
	}
	if most := p.lim.pathLength; most > 0 && (len(h.name) > most || len(h.link) > most) {
		return overLimit("path of %d bytes, more than %d", max(len(h.name), len(h.link)), most)
	}
	if bytes.IndexByte([]byte(h.name), 0) >= 0 || bytes.IndexByte([]byte(h.link), 0) >= 0 {
		return malformed("NUL in a path")
	}
	p.setBody(h.stored)
	if h.typ == typeDir {
		h.size = 0 // the body, if any, is a list of GNU tar
	}
	var err error
	switch {
	case h.typ == typeGNUSparse:
		h.typ = typeReg
		err = p.oldSparse(h, old)
	case sp.isSparse && h.typ == typeReg:
		err = p.paxSparse(h, &sp)
	}
	if err != nil {
		return err
	}
	n := 0
	for _, x := range h.xattrs {
		n += len(x.name) + len(x.value)
	}
	if p.lim.xattrBytes > 0 && n > p.lim.xattrBytes {
		return overLimit("%d bytes of xattrs, more than %d", n, p.lim.xattrBytes)
	}
	if p.lim.bytes > 0 && h.size > p.lim.bytes-p.content {
		return overLimit("content of %d bytes makes more than %d in all", h.size, p.lim.bytes)
	}
	p.content += h.size
	return nil
}

// oldSparse reads the map of an entry of type S: four pairs in the header, 21
// in each block that follows it (GNU tar manual, "The Old GNU Format").
func (p *parser) oldSparse(h *header, b []byte) error {
	if string(b[257:265]) != "ustar  \x00" {
		return malformed("sparse entry without the GNU magic")
	}
	size, ok := number(b[483:495])
	if !ok || size < 0 {
		return malformed("sparse entry without a size")
	}
	var numbers []int64
	pairs, more := b[386:482], b[482] != 0
	for {
		for ; len(pairs) >= 24 && pairs[0] != 0; pairs = pairs[24:] {
			off, ok1 := number(pairs[:12])
			n, ok2 := number(pairs[12:24])
			if !ok1 || !ok2 {
				return malformed("map of holes has a field that is not a number")
			}
			if len(numbers) >= 2*maxExtents {
				return overLimit("more than %d pieces in a sparse file", maxExtents)
			}
			numbers = append(numbers, off, n)
		}
		if !more {
			break
		}
		next, err := p.block()
		if err == io.EOF {
			err = errTruncated
		}
		if err != nil {
			return err
		}
		pairs, more = next[:504], next[504] != 0
	}
	return setSparse(h, numbers, size)
}

// paxSparse reads the map of versions 0.0, 0.1 (in the records) and 1.0 (at
// the start of the body, in decimal, one number a line).
func (p *parser) paxSparse(h *header, sp *gnuSparse) error {
	size := h.size
	if sp.hasSize {
		size = sp.realSize
	}
	switch {
	case sp.major == "" || sp.major == "0":
		return setSparse(h, sp.numbers, size)
	case sp.major != "1" || sp.minor != "0":
		return malformed("sparse format %s.%s is unknown", shorten(sp.major), shorten(sp.minor))
	}
	var numbers []int64
	var line []byte
	want := int64(1) // the count of pairs comes first
	for count := int64(-1); int64(len(numbers)) < want || count < 0; {
		if p.left < blockSize {
			return malformed("map of holes is longer than the entry")
		}
		b, err := p.block()
		if err == io.EOF {
			err = errTruncated
		}
		if err != nil {
			return err
		}
		p.left -= blockSize
		h.stored -= blockSize
		for len(b) > 0 && (count < 0 || int64(len(numbers)) < want) {
			i := bytes.IndexByte(b, '\n')
			if i < 0 {
				line, b = append(line, b...), nil
				if len(line) > 20 {
					return malformed("map of holes has a field that is not a number")
				}
				break
			}
			line, b = append(line, b[:i]...), b[i+1:]
			n, err := strconv.ParseInt(string(line), 10, 64)
			if err != nil || n < 0 {
				return malformed("map of holes has a field that is not a number")
			}
			line = line[:0]
			if count < 0 {
				if n > maxExtents {
					return overLimit("%d pieces in a sparse file, more than %d", n, maxExtents)
				}
				count, want = n, 2*n
				continue
			}
			numbers = append(numbers, n)
		}
	}
	return setSparse(h, numbers, size)
}

// end reads what follows the first zero block, to the end of the stream: the
// digest of a layer covers all of it.
func (p *parser) end() error {
	b, err := p.block()
	switch {
	case err == io.EOF:
		return nil
	case err != nil && err != errTruncated:
		return err
	case err == nil && !isZero(b):
		return malformed("zero block in the middle of the stream")
	}
	for {
		p.buf = nil
		if err := p.fill(); err != nil {
			if err == io.EOF {
				err = nil
			}
			return err
		}
	}
}

// release gives back the chunk the parser holds.
func (p *parser) release() {
	if p.cur != nil {
		p.cur.release()
		p.cur, p.buf = nil, nil
	}
}
