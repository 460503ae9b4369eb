package sys

import (
	"os"
	"testing"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

func TestOpenLog(t *testing.T) {
	path := t.TempDir() + "/log"
	say := func(t *testing.T, text string) {
		t.Helper()
		f, err := OpenLog(path, 3)
		require.NoError(t, err)
		defer f.Close()
		_, err = f.WriteString(text)
		require.NoError(t, err)
	}
	is := func(t *testing.T, path, want string) {
		t.Helper()
		b, err := os.ReadFile(path)
		require.NoError(t, err)
		require.Equal(t, want, string(b))
	}
	t.Run("appends", func(t *testing.T) {
		say(t, "1")
		say(t, "23")
		say(t, "4")
		is(t, path, "1234")
		require.NoFileExists(t, path+".old")
	})
	t.Run("long", func(t *testing.T) {
		say(t, "5678")
		is(t, path, "5678")
		is(t, path+".old", "1234")
		fi, err := os.Stat(path)
		require.NoError(t, err)
		require.EqualValues(t, 0o600, fi.Mode().Perm())
	})
	t.Run("not put aside", func(t *testing.T) {
		require.NoError(t, os.Remove(path+".old"))
		require.NoError(t, os.Mkdir(path+".old", 0o700))
		say(t, "9")
		is(t, path, "56789")
	})
	t.Run("link", func(t *testing.T) {
		require.NoError(t, os.Rename(path, path+".2"))
		require.NoError(t, os.Symlink(path+".2", path))
		_, err := OpenLog(path, 3)
		require.ErrorIs(t, err, unix.ELOOP)
		is(t, path+".2", "56789")
	})
}
