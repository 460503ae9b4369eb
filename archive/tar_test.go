package archive_test

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"io"
	"os"
	"os/exec"
	"testing"
	"time"

	"github.com/klauspost/compress/zstd"
	"github.com/stretchr/testify/require"
	"github.com/ulikunitz/xz"

	"github.com/layerfs/layerfs/internal/testenv"
)

func TestMain(m *testing.M) { os.Exit(testenv.Main(m)) }

// entry is one entry of a test stream.
type entry struct {
	hdr  tar.Header
	body string
}

var testTime = time.Unix(1700000000, 0)

func dirEntry(name string, mode int64) entry {
	return entry{tar.Header{Typeflag: tar.TypeDir, Name: name, Mode: mode, ModTime: testTime}, ""}
}

func fileEntry(name, body string) entry {
	return entry{tar.Header{Typeflag: tar.TypeReg, Name: name, Mode: 0o644, ModTime: testTime, Size: int64(len(body))}, body}
}

func symlinkEntry(name, target string) entry {
	return entry{tar.Header{Typeflag: tar.TypeSymlink, Name: name, Linkname: target, Mode: 0o777, ModTime: testTime}, ""}
}

func linkEntry(name, target string) entry {
	return entry{tar.Header{Typeflag: tar.TypeLink, Name: name, Linkname: target, Mode: 0o644, ModTime: testTime}, ""}
}

func xattrEntry(e entry, name, value string) entry {
	e.hdr.PAXRecords = map[string]string{"SCHILY.xattr." + name: value}
	return e
}

// makeTar writes a stream with the standard library, our oracle for formats.
func makeTar(tb testing.TB, entries ...entry) []byte {
	tb.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, e := range entries {
		h := e.hdr
		require.NoError(tb, w.WriteHeader(&h), h.Name)
		_, err := w.Write([]byte(e.body))
		require.NoError(tb, err)
	}
	require.NoError(tb, w.Close())
	return b.Bytes()
}

func tarHeader(typ byte, name string) tar.Header {
	return tar.Header{Typeflag: typ, Name: name, Mode: 0o644, ModTime: testTime}
}

func newGzip(w io.Writer) io.WriteCloser { return gzip.NewWriter(w) }

// compressions returns a stream in every form that is read.
func compressions(tb testing.TB, b []byte) map[string][]byte {
	tb.Helper()
	out := make(map[string][]byte)
	for name, wrap := range map[string]func(io.Writer) (io.WriteCloser, error){
		"gzip": func(w io.Writer) (io.WriteCloser, error) { return newGzip(w), nil },
		"zstd": func(w io.Writer) (io.WriteCloser, error) { return zstd.NewWriter(w) },
		"xz":   func(w io.Writer) (io.WriteCloser, error) { return xz.NewWriter(w) },
	} {
		var z bytes.Buffer
		w, err := wrap(&z)
		require.NoError(tb, err)
		_, err = w.Write(b)
		require.NoError(tb, err)
		require.NoError(tb, w.Close())
		out[name] = z.Bytes()
	}
	if _, err := exec.LookPath("bzip2"); err == nil {
		c := exec.Command("bzip2", "-c")
		c.Stdin = bytes.NewReader(b)
		z, err := c.Output()
		require.NoError(tb, err)
		out["bzip2"] = z
	}
	return out
}
