package sys

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"unsafe"
)

// dmLayout is what a C program that includes linux/dm-ioctl.h and linux/fs.h
// prints for amd64; TestDMHeader makes it anew where a compiler is.
const dmLayout = `dm_ioctl 312
version 0
data_size 12
data_start 16
target_count 20
open_count 24
flags 28
event_nr 32
dev 40
name 48
uuid 176
data 305
dm_target_spec 40
status 16
next 20
target_type 24
dm_target_msg 8
dm_target_deps 8
dm_name_list 16
name 12
dm_target_versions 16
version 4
DM_VERSION c138fd00
DM_LIST_DEVICES c138fd02
DM_DEV_CREATE c138fd03
DM_DEV_REMOVE c138fd04
DM_DEV_RENAME c138fd05
DM_DEV_SUSPEND c138fd06
DM_DEV_STATUS c138fd07
DM_TABLE_LOAD c138fd09
DM_TABLE_CLEAR c138fd0a
DM_TABLE_DEPS c138fd0b
DM_TABLE_STATUS c138fd0c
DM_LIST_VERSIONS c138fd0d
DM_TARGET_MSG c138fd0e
DM_DEV_ARM_POLL c138fd10
DM_GET_TARGET_VERSION c138fd11
BLKDISCARD 1277
BLKGETSIZE64 80081272
`

func goDMLayout() string {
	var b strings.Builder
	p := func(name string, v any) { fmt.Fprintln(&b, name, v) }
	var h DMIoctl
	p("dm_ioctl", unsafe.Sizeof(h))
	p("version", unsafe.Offsetof(h.Version))
	p("data_size", unsafe.Offsetof(h.DataSize))
	p("data_start", unsafe.Offsetof(h.DataStart))
	p("target_count", unsafe.Offsetof(h.TargetCount))
	p("open_count", unsafe.Offsetof(h.OpenCount))
	p("flags", unsafe.Offsetof(h.Flags))
	p("event_nr", unsafe.Offsetof(h.EventNr))
	p("dev", unsafe.Offsetof(h.Dev))
	p("name", unsafe.Offsetof(h.Name))
	p("uuid", unsafe.Offsetof(h.UUID))
	p("data", unsafe.Offsetof(h.Data))
	var s DMTargetSpec
	p("dm_target_spec", unsafe.Sizeof(s))
	p("status", unsafe.Offsetof(s.Status))
	p("next", unsafe.Offsetof(s.Next))
	p("target_type", unsafe.Offsetof(s.TargetType))
	p("dm_target_msg", unsafe.Sizeof(DMTargetMsg{}))
	p("dm_target_deps", unsafe.Sizeof(DMTargetDeps{}))
	p("dm_name_list", unsafe.Sizeof(DMNameList{}))
	p("name", unsafe.Offsetof(DMNameList{}.Name))
	p("dm_target_versions", unsafe.Sizeof(DMTargetVersions{}))
	p("version", unsafe.Offsetof(DMTargetVersions{}.Version))
	for _, r := range []struct {
		name string
		nr   uint
	}{
		{"DM_VERSION", DMVersionReq()},
		{"DM_LIST_DEVICES", DMListDevicesReq()},
		{"DM_DEV_CREATE", DMDevCreateReq()},
		{"DM_DEV_REMOVE", DMDevRemoveReq()},
		{"DM_DEV_RENAME", DMDevRenameReq()},
		{"DM_DEV_SUSPEND", DMDevSuspendReq()},
		{"DM_DEV_STATUS", DMDevStatusReq()},
		{"DM_TABLE_LOAD", DMTableLoadReq()},
		{"DM_TABLE_CLEAR", DMTableClearReq()},
		{"DM_TABLE_DEPS", DMTableDepsReq()},
		{"DM_TABLE_STATUS", DMTableStatusReq()},
		{"DM_LIST_VERSIONS", DMListVersionsReq()},
		{"DM_TARGET_MSG", DMTargetMsgReq()},
		{"DM_DEV_ARM_POLL", DMDevArmPollReq()},
		{"DM_GET_TARGET_VERSION", DMGetTargetVersionReq()},
		{"BLKDISCARD", BlkDiscardReq()},
		{"BLKGETSIZE64", BlkGetSize64Req()},
	} {
		p(r.name, fmt.Sprintf("%x", r.nr))
	}
	return b.String()
}

func TestDMLayout(t *testing.T) {
	if got := goDMLayout(); got != dmLayout {
		t.Errorf("layout is\n%s\nwant\n%s", got, dmLayout)
	}
}

func TestDMHeader(t *testing.T) {
	cc, err := exec.LookPath("cc")
	if err != nil {
		t.Skip("no C compiler:", err)
	}
	if _, err := os.Stat("/usr/include/linux/dm-ioctl.h"); err != nil {
		t.Skip("no kernel headers:", err)
	}
	var c strings.Builder
	c.WriteString("#include <stdio.h>\n#include <stddef.h>\n#include <linux/types.h>\n#include <sys/ioctl.h>\n#include <linux/fs.h>\n#include <linux/dm-ioctl.h>\nint main(void) {\n")
	strct := ""
	for line := range strings.Lines(dmLayout) {
		name := strings.Fields(line)[0]
		switch {
		case strings.HasPrefix(name, "dm_"):
			strct = name
			fmt.Fprintf(&c, "printf(\"%s %%zu\\n\", sizeof(struct %s));\n", name, name)
		case name == strings.ToUpper(name):
			fmt.Fprintf(&c, "printf(\"%s %%lx\\n\", (unsigned long)%s);\n", name, name)
		default:
			fmt.Fprintf(&c, "printf(\"%s %%zu\\n\", offsetof(struct %s, %s));\n", name, strct, name)
		}
	}
	c.WriteString("}\n")
	dir := t.TempDir()
	src, bin := filepath.Join(dir, "layout.c"), filepath.Join(dir, "layout")
	if err := os.WriteFile(src, []byte(c.String()), 0o644); err != nil {
		t.Fatal(err)
	}
	if out, err := exec.Command(cc, "-o", bin, src).CombinedOutput(); err != nil {
		t.Fatalf("cc: %v: %s", err, out)
	}
	out, err := exec.Command(bin).Output()
	if err != nil {
		t.Fatal(err)
	}
	if string(out) != goDMLayout() {
		t.Errorf("the headers say\n%s\nGo says\n%s", out, goDMLayout())
	}
}
