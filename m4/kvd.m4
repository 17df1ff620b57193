dnl KVD_REQUIRE_MODULE(VARIABLE, MODULES, DEBIAN-PACKAGE, [ALTERNATIVE])
dnl pkg-config modules that the build cannot do without; a failure names the package that brings them.
AC_DEFUN([KVD_REQUIRE_MODULE], [
    PKG_CHECK_MODULES([$1], [$2], [],
        [AC_MSG_ERROR([$2 was not found by pkg-config: install the Debian package $3$4])])
])

dnl KVD_REQUIRE_PROG(VARIABLE, PROGRAM, DEBIAN-PACKAGE)
AC_DEFUN([KVD_REQUIRE_PROG], [
    AC_ARG_VAR([$1], [path of $2])
    AC_PATH_PROG([$1], [$2])
    AS_IF([test -z "$$1"], [AC_MSG_ERROR([$2 was not found: install the Debian package $3])])
])

dnl KVD_ARG_SWITCH(NAME, WHAT): --enable-NAME, off by default; sets enable_NAME.
AC_DEFUN([KVD_ARG_SWITCH], [
    AC_ARG_ENABLE([$1], [AS_HELP_STRING([--enable-$1], [$2])], [], [AS_TR_SH([enable_$1])=no])
])

dnl KVD_ARG_DIR(NAME, DEFAULT, WHAT): --with-NAME=DIR; substitutes NAME.
AC_DEFUN([KVD_ARG_DIR], [
    AC_ARG_WITH([$1], [AS_HELP_STRING([--with-$1=DIR], [directory for $3])], [$1=$withval], [$1='$2'])
    AS_CASE(["$$1"], [yes|no|''], [AC_MSG_ERROR([--with-$1 needs a directory])])
    AC_SUBST([$1])
])

dnl KVD_ADD_CFLAGS(VARIABLE, FLAGS): append each flag that the compiler takes.
AC_DEFUN([KVD_ADD_CFLAGS], [
    for kvd_flag in $2; do
        AC_MSG_CHECKING([whether $CC takes $kvd_flag])
        kvd_saved=$CFLAGS
        CFLAGS="$CFLAGS -Werror $kvd_flag"
        AC_COMPILE_IFELSE([AC_LANG_PROGRAM([], [])],
            [AC_MSG_RESULT([yes]); $1="$$1 $kvd_flag"], [AC_MSG_RESULT([no])])
        CFLAGS=$kvd_saved
    done
])

dnl KVD_ADD_LDFLAGS(VARIABLE, FLAGS): append each flag that the linker takes.
AC_DEFUN([KVD_ADD_LDFLAGS], [
    for kvd_flag in $2; do
        AC_MSG_CHECKING([whether $CC links with $kvd_flag])
        kvd_saved=$LDFLAGS
        LDFLAGS="$LDFLAGS $kvd_flag"
        AC_LINK_IFELSE([AC_LANG_PROGRAM([], [])],
            [AC_MSG_RESULT([yes]); $1="$$1 $kvd_flag"], [AC_MSG_RESULT([no])])
        LDFLAGS=$kvd_saved
    done
])

dnl KVD_TRY_LINK_FLAGS(FLAGS, IF-NOT): see that a program compiles and links with FLAGS.
AC_DEFUN([KVD_TRY_LINK_FLAGS], [
    AC_MSG_CHECKING([whether $CC links with $1])
    kvd_saved=$CFLAGS
    CFLAGS="$CFLAGS $1"
    AC_LINK_IFELSE([AC_LANG_PROGRAM([], [])], [kvd_links=yes], [kvd_links=no])
    CFLAGS=$kvd_saved
    AC_MSG_RESULT([$kvd_links])
    AS_IF([test "x$kvd_links" = xno], [$2])
])
