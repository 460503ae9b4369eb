package archive

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"io"
	"strings"
	"testing"
	"time"

	"github.com/layerfs/layerfs"
)

// readAll parses a whole stream.
func readAll(data []byte) (headers []*header, bodies []string, err error) {
	ctx := context.Background()
	src := newSource(ctx, bytes.NewReader(data), 0, false)
	p := &parser{ctx: ctx, src: src, lim: newLimits(layerfs.Limits{PathLength: -1, XattrBytes: -1})}
	defer src.close(ctx)
	defer p.release()
	for {
		h, err := p.next()
		if h == nil || err != nil {
			return headers, bodies, err
		}
		var b strings.Builder
		for {
			piece, _, err := p.piece()
			if err != nil {
				return headers, bodies, err
			}
			if piece == nil {
				break
			}
			b.Write(piece)
		}
		headers, bodies = append(headers, h), append(bodies, b.String())
	}
}

// expand gives the content of a file with its holes.
func expand(h *header, body string) string {
	if !h.isSparse || h.size > 1<<20 {
		return body
	}
	out := make([]byte, h.size)
	for _, e := range h.sparse {
		copy(out[e.off:e.off+e.len], body)
		body = body[e.len:]
	}
	return string(out)
}

func seedStreams(f *testing.F) {
	add := func(format tar.Format, hs ...tar.Header) {
		var b bytes.Buffer
		w := tar.NewWriter(&b)
		for _, h := range hs {
			h.Format = format
			if w.WriteHeader(&h) == nil {
				_, _ = w.Write(make([]byte, h.Size))
			}
		}
		_ = w.Close()
		f.Add(b.Bytes())
	}
	when := time.Unix(1234567890, 0)
	long := strings.Repeat("n", 150)
	hs := []tar.Header{
		{Typeflag: tar.TypeReg, Name: "f", Size: 700, Mode: 0o644, ModTime: when, Uid: 5},
		{Typeflag: tar.TypeDir, Name: "d/", Mode: 0o755, ModTime: when},
		{Typeflag: tar.TypeSymlink, Name: "s", Linkname: "d", ModTime: when},
		{Typeflag: tar.TypeLink, Name: "l", Linkname: "f", ModTime: when},
		{Typeflag: tar.TypeChar, Name: "c", Devmajor: 1, Devminor: 3, ModTime: when},
		{Typeflag: tar.TypeReg, Name: long, ModTime: when},
		{Typeflag: tar.TypeSymlink, Name: "sl", Linkname: long, ModTime: when},
	}
	for _, format := range []tar.Format{tar.FormatUSTAR, tar.FormatPAX, tar.FormatGNU} {
		add(format, hs...)
	}
	add(tar.FormatPAX, tar.Header{Typeflag: tar.TypeReg, Name: "x", ModTime: when.Add(5), AccessTime: when, PAXRecords: map[string]string{"SCHILY.xattr.user.a": "b"}})
	add(tar.FormatPAX, tar.Header{Typeflag: tar.TypeXGlobalHeader, PAXRecords: map[string]string{"comment": "c"}}, hs[0])
	add(tar.FormatGNU, tar.Header{Typeflag: tar.TypeReg, Name: "big", Uid: 1 << 30, ModTime: time.Unix(-5, 0)})
	var sparse []byte
	h := &header{name: "sp/arse", typ: typeReg, isSparse: true, size: 5000, stored: 700, sparse: []extent{{512, 600}, {4000, 100}}}
	body := appendMap(nil, h.sparse, h.size)
	h.stored += int64(len(body))
	sparse = append(appendHeader(nil, h), body...)
	sparse = append(sparse, bytes.Repeat([]byte("x"), 700)...)
	sparse = append(appendPadding(sparse, 700), make([]byte, endMark)...)
	f.Add(sparse)
}

// TestSizeWithoutBody: what has no body may have a size, which does not hide the
// entry behind it; what may have one is skipped with it.
func TestSizeWithoutBody(t *testing.T) {
	for _, c := range []struct {
		name  string
		typ   byte
		entry string
		body  bool
	}{
		{"directory", typeDir, "d/", false},
		{"directory before POSIX", 0, "d/", false},
		{"file with a slash", typeReg, "d/", true},
		{"dump of a directory", typeGNUDump, "d/", true},
		{"symlink", typeSymlink, "d", false},
		{"hard link", typeLink, "d", false},
		{"fifo", typeFifo, "d", false},
	} {
		t.Run(c.name, func(t *testing.T) {
			stream := appendHeader(nil, &header{name: c.entry, link: "to", typ: c.typ, mode: 0o755, stored: 493})
			if c.body {
				stream = appendPadding(append(stream, bytes.Repeat([]byte("b"), 493)...), 493)
			}
			stream = append(stream, appendHeader(nil, &header{name: "next", typ: typeReg, size: 4, stored: 4})...)
			stream = appendPadding(append(stream, "text"...), 4)
			stream = append(stream, make([]byte, endMark)...)

			headers, bodies, err := readAll(stream)
			if err != nil || len(headers) != 2 {
				t.Fatalf("%d entries, %v", len(headers), err)
			}
			if h := headers[0]; h.name != c.entry || h.size != 0 {
				t.Errorf("first entry %+v", h)
			}
			if h := headers[1]; h.name != "next" || bodies[1] != "text" {
				t.Errorf("second entry %+v with %q", h, bodies[1])
			}
			r := tar.NewReader(bytes.NewReader(stream))
			for _, want := range headers {
				h, err := r.Next()
				if err != nil || h.Name != want.name {
					t.Fatalf("archive/tar: %+v, %v, want %q", h, err, want.name)
				}
			}
		})
	}
}

// FuzzHeader: what archive/tar reads, we read the same way.
func FuzzHeader(f *testing.F) {
	seedStreams(f)
	f.Fuzz(func(t *testing.T, data []byte) {
		if Detect(data) != layerfs.NoCompression {
			return
		}
		data = FixChecksums(data)
		headers, bodies, err := readAll(data)
		r := tar.NewReader(bytes.NewReader(data))
		for i := 0; ; i++ {
			want, terr := r.Next()
			for terr == nil && (want.Typeflag == tar.TypeXGlobalHeader || want.Typeflag == typeGNUVolume) {
				if want.Typeflag == tar.TypeXGlobalHeader {
					return // it does not apply them to what follows, as POSIX wants
				}
				want, terr = r.Next()
			}
			if terr != nil {
				return // we may know formats it does not; the fuzzer of Apply looks at these
			}
			if i == len(headers) {
				// It reads what we refuse on purpose: see the texts.
				if err == nil {
					t.Fatalf("we end before %q", want.Name)
				}
				if !errors.Is(err, layerfs.ErrMalformed) && !errors.Is(err, layerfs.ErrLimit) {
					t.Fatalf("%q: %v", want.Name, err)
				}
				for _, ok := range []string{"unknown type", "truncated", "NUL in a path", "map of holes", "sparse", "not a number", "pax record", "extended header", "pieces"} {
					if strings.Contains(err.Error(), ok) {
						return
					}
				}
				t.Fatalf("archive/tar reads %+v, we say %v", want, err)
			}
			h := headers[i]
			body, berr := io.ReadAll(io.LimitReader(r, 1<<20))
			if h.typ == typeDir {
				want.Size, body = 0, nil
			}
			if h.name != want.Name || h.link != want.Linkname || int64(h.mode) != want.Mode&0o7777 ||
				h.uid != int64(want.Uid) || h.gid != int64(want.Gid) || h.typ == typeReg && h.size != want.Size {
				t.Fatalf("entry %d: we have %+v, archive/tar %+v", i, h, want)
			}
			if h.mtime != stampOf(want.ModTime) && !(want.ModTime.Equal(time.Unix(0, 0)) || want.ModTime.IsZero()) {
				t.Fatalf("%q: mtime %v, archive/tar %v", h.name, h.mtime, stampOf(want.ModTime))
			}
			for _, x := range h.xattrs {
				if v, ok := want.PAXRecords["SCHILY.xattr."+x.name]; ok && v != x.value {
					t.Fatalf("%q: xattr %q %q, archive/tar %q", h.name, x.name, x.value, v)
				}
			}
			if berr == nil && h.typ == typeReg && h.size <= 1<<20 && expand(h, bodies[i]) != string(body) {
				t.Fatalf("%q: contents differ", h.name)
			}
			if berr != nil {
				return
			}
		}
	})
}

// FuzzWriteHeader: what we write, we and archive/tar read back.
func FuzzWriteHeader(f *testing.F) {
	f.Add("name", "", byte(typeReg), uint32(0o644), int64(0), int64(0), int64(0), int64(0), int64(5), "user.x", "v")
	f.Add(strings.Repeat("d/", 140), "", byte(typeDir), uint32(0o755), int64(1<<22), int64(1<<30), int64(-5), int64(999999999), int64(0), "", "")
	f.Add(strings.Repeat("a", 90)+"/"+strings.Repeat("b", 90), "l\xff", byte(typeSymlink), uint32(0o777), int64(0), int64(0), int64(1<<40), int64(1), int64(0), "", "")
	f.Fuzz(func(t *testing.T, name, link string, typ byte, mode uint32, uid, gid, sec, nsec, size int64, xname, xvalue string) {
		h := &header{name: name, link: link, typ: typ, mode: mode & 0o7777, uid: uid & (1<<32 - 1), gid: gid & (1<<32 - 1)}
		h.mtime = stamp{sec >> 8, (nsec & (1<<62 - 1)) % 1e9}
		bad := name == "" || strings.ContainsAny(name+link+xname, "\x00") || typ < typeReg || typ > typeFifo ||
			strings.HasSuffix(name, "/") != (typ == typeDir) || strings.ContainsAny(xname, "=")
		if bad {
			return
		}
		if typ == typeReg {
			h.size = size & 0xffff
			h.stored = h.size
		}
		if typ != typeLink && typ != typeSymlink {
			h.link = ""
		}
		if xname != "" {
			h.xattrs = []xattr{{xname, xvalue}}
		}
		data := append(appendHeader(nil, h), make([]byte, h.size)...)
		data = append(appendPadding(data, int(h.size)), make([]byte, endMark)...)
		if len(data)%blockSize != 0 {
			t.Fatalf("%d bytes are no whole blocks", len(data))
		}
		got, _, err := readAll(data)
		if err != nil || len(got) != 1 {
			t.Fatalf("%+v: %v", h, err)
		}
		g := got[0]
		if g.name != name || g.link != h.link || g.typ != typ || g.mode != h.mode || g.uid != h.uid || g.gid != h.gid || g.mtime != h.mtime || g.size != h.size {
			t.Fatalf("wrote %+v, read %+v", h, g)
		}
		if len(g.xattrs) != len(h.xattrs) || len(g.xattrs) == 1 && g.xattrs[0] != h.xattrs[0] {
			t.Fatalf("wrote %q, read %q", h.xattrs, g.xattrs)
		}
		r := tar.NewReader(bytes.NewReader(data))
		w, err := r.Next()
		if err != nil {
			if h.mtime.sec < 0 || xname != "" || xvalue != "" {
				return // it has a smaller range
			}
			t.Fatalf("%+v: archive/tar: %v", h, err)
		}
		if w.Name != name || w.Linkname != h.link || w.Typeflag != typ || int64(w.Uid) != h.uid || w.Size != h.size || stampOf(w.ModTime) != h.mtime {
			t.Fatalf("wrote %+v, archive/tar reads %+v", h, w)
		}
	})
}

func TestPAXTime(t *testing.T) {
	for _, tt := range []struct {
		in   string
		want stamp
		ok   bool
	}{
		{"0", stamp{0, 0}, true}, {"1.5", stamp{1, 5e8}, true}, {"-1.5", stamp{-2, 5e8}, true}, {"-0.1", stamp{-1, 9e8}, true},
		{"1.0000000009", stamp{1, 0}, true}, {"12.123456789999", stamp{12, 123456789}, true}, {"5.", stamp{5, 0}, true},
		{"", stamp{}, false}, {".5", stamp{}, false}, {"1.x", stamp{}, false}, {"1e5", stamp{}, false}, {"--1", stamp{}, false},
		{"-9223372036854775808.5", stamp{}, false}, {"99999999999999999999", stamp{}, false},
	} {
		got, ok := paxTime(tt.in)
		if got != tt.want && tt.ok || ok != tt.ok {
			t.Errorf("paxTime(%q) = %v, %v, want %v, %v", tt.in, got, ok, tt.want, tt.ok)
		}
		if ok && len(tt.in) < 8 && !strings.HasSuffix(tt.in, ".") {
			if s := formatTime(got); s != tt.in {
				t.Errorf("formatTime(%v) = %q, want %q", got, s, tt.in)
			}
		}
	}
}

func TestCleanName(t *testing.T) {
	for in, want := range map[string]string{
		"": "", ".": "", "/": "", "./": "", "..": "", "/..": "", "../..": "", "a": "a", "/a": "a", "./a/": "a", "a//b": "a/b",
		"a/../b": "b", "a/../../b": "b", "../a": "a", "/../../a/b": "a/b", "...": "...", "..a": "..a", "a/..": "",
	} {
		if got := cleanName(in); got != want {
			t.Errorf("cleanName(%q) = %q, want %q", in, got, want)
		}
	}
}
